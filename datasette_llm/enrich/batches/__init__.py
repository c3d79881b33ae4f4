"""A job whose prompts travel in batches, and which outlives its process.

The same command submits the rows that wait, ends, and later collects what is done. What is known of batches
is in the record of answers, so that a process may be killed at any moment: nothing is sent or written twice,
and nothing that was answered is lost.
"""
