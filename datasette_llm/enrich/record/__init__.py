"""The record of answers: which run gave which row its value, and for which question.

Two tables in the database that is enriched, hidden by their leading underscore: ``_llm_runs``, one row for
each run, and ``_llm_answers``, one compact row for each value. They are written in the transactions that
write the values, so that they never disagree with the table. Beside them `failures` keeps the rows that
failed, and `batches` those that are with a provider. Knows nothing of models, prompts or jobs.
"""
