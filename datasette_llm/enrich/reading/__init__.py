"""Rows on their way to a prompt: the table, which rows, in which order, and the template over one of them."""
