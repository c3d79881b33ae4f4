"""Answers on their way into the table: what an answer has to be, and how it gets there whatever happens."""
