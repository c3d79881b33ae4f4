"""SQLite's values and names."""

from __future__ import annotations

from typing import TypeAlias

SQLValue: TypeAlias = int | float | str | bytes | None


def quote(name: str) -> str:
    """Quote an identifier, whatever characters are in it."""
    return '"' + name.replace('"', '""') + '"'
