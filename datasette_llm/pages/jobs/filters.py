"""The rows that a table's page shows, as the rows of a job: its filters become one SQL condition.

Datasette's own machinery makes SQL of them, plugins' filters and search included, and checks who may give
conditions of their own. A job keeps its condition as text, so parameters become literals in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from datasette.filters import Filters
from datasette.plugins import pm
from datasette.utils import await_me_maybe

if TYPE_CHECKING:
    from collections.abc import Mapping

#: What begins with an underscore is about the page (how it is sorted, say), but for these.
_ABOUT_ROWS = ("_search", "_where", "_through")

#: A parameter; or what may contain something that looks like one: strings, names and comments.
_TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | \[[^\]]*\] | --[^\n]* | /\*.*?\*/ | :(\w+)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Filtered:
    """Rows of a table.

    Attributes:
        where: an SQL condition, ``None`` for all rows.
        words: the same for people; empty for all rows.
    """

    where: str | None = None
    words: str = ""


def query_about_rows(query_string: str) -> str:
    """Return the part of a table page's query string that says which rows it shows."""
    return urlencode(
        [
            (name, value)
            for name, value in parse_qsl(query_string, keep_blank_values=True)
            if _is_filter(name) or name.startswith(_ABOUT_ROWS)
        ]
    )


async def read_filters(datasette: Any, request: Any, database: str, table: str) -> Filtered:
    """Return the rows that the arguments of a request name.

    Raises:
        DatasetteError: this actor may not filter so, or there is no such filter.
    """
    pairs = [
        (name, value) for name in request.args if _is_filter(name) for value in request.args.getlist(name)
    ]
    filters = Filters(sorted(pairs))
    clauses, parameters = filters.build_where_clauses(table)
    words: list[str] = []
    for hook in pm.hook.filters_from_request(
        request=request, table=table, database=database, datasette=datasette
    ):
        more = await await_me_maybe(hook)
        if more:
            clauses += more.where_clauses
            parameters.update(more.params)
            words += more.human_descriptions
    if not clauses:
        return Filtered()
    words += [f"where {clause}" for clause in request.args.getlist("_where")]
    where = " and ".join(_in_brackets(with_literals(clause, parameters)) for clause in clauses)
    return Filtered(where, filters.human_description_en(extra=words))


def _in_brackets(clause: str) -> str:
    # The newline ends an SQL comment of somebody's own condition.
    return f"({clause}\n)" if "--" in clause else f"({clause})"


def with_literals(sql: str, parameters: Mapping[str, Any]) -> str:
    """Return SQL with its named parameters written out."""

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        return literal(parameters[name]) if name in parameters else match[0]

    return _TOKEN.sub(replaced, sql)


def literal(value: Any) -> str:
    """Return a value as SQL writes it."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int)):
        return str(int(value))
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, bytes):
        return f"x'{value.hex()}'"
    text = str(value)
    if "\0" in text:  # SQLite would read no further.
        return f"cast(x'{text.encode().hex()}' as text)"
    return "'" + text.replace("'", "''") + "'"


def _is_filter(name: str) -> bool:
    return not name.startswith("_") or "__" in name
