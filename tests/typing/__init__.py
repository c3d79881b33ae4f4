"""Code that type checkers read and nothing runs."""
