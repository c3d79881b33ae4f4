"""Answers on their way into the table, and how they get there whatever happens."""
