"""How the key of a row is noted in a table of ours: in one column, whatever the table's key is.

A key of one column is kept as it is, so that it joins. A compound key is a JSON array, written as SQLite's
``json_array()`` writes it, so that SQL can make the same text of a row.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..sql import SQLValue


def noted_key(key: Sequence[SQLValue]) -> SQLValue:
    """Return what stands for a row's key."""
    if len(key) == 1:
        return key[0]
    values = [f"x'{value.hex().upper()}'" if isinstance(value, bytes) else value for value in key]
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def key_of(noted: SQLValue, width: int) -> tuple[Any, ...] | None:
    """Return the key that was noted, or ``None`` if it is not of a table with so many key columns."""
    if width == 1:
        return (noted,)
    try:
        values = json.loads(noted) if isinstance(noted, str) else None
    except ValueError:
        return None
    if not isinstance(values, list) or len(values) != width:
        return None
    return tuple(_bytes(value) if isinstance(value, str) else value for value in values)


def noted_key_sql(names: Sequence[str]) -> str:
    """Return the SQL expression for what `noted_key` makes of a row's key.

    Args:
        names: SQL expressions for the parts of the key, already quoted.
    """
    if len(names) == 1:
        # The plus keeps SQLite from comparing by the column's type, for which it could not use our index.
        return f"+{names[0]}"
    parts = [
        f"case typeof({name}) when 'blob' then 'x''' || hex({name}) || '''' else {name} end" for name in names
    ]
    return f"json_array({', '.join(parts)})"


def _bytes(text: str) -> str | bytes:
    if text.startswith("x'") and text.endswith("'"):
        try:
            return bytes.fromhex(text[2:-1])
        except ValueError:
            return text
    return text
