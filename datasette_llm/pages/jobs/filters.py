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
from datasette.utils.asgi import BadRequest

from ...enrich.database import read
from ...enrich.reading.selection import Selection
from ...enrich.reading.table import ROWID_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...enrich.reading.table import Table

#: What Datasette can filter a column by.
LOOKUPS = frozenset(key for key, *_ in Filters([]).lookups())

#: What is about the page, not about its rows; other arguments that begin so may be filters of plugins.
_ABOUT_THE_PAGE = re.compile(
    r"_(sort|sort_desc|sort_by_desc|facet|facet_\w+|size|next|col|nocol|nofacet|nosuggest|nocount|labels?|json"
    r"|json_infinity|shape|extra|stream|dl|header|blob_column|blob_hash|ttl|hash|timelimit|trace)"
)

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
            if _is_filter(name) or not _ABOUT_THE_PAGE.fullmatch(name)
        ]
    )


async def read_filters(datasette: Any, request: Any, database: str, table: str) -> Filtered:
    """Return the rows that the arguments of a request name.

    Raises:
        DatasetteError: this actor may not filter so.
        BadRequest: there is no such filter, or no such column (any more). Datasette may show all rows then,
            which is no reason to pay for them.
    """
    pairs = [
        (name, value) for name in request.args if _is_filter(name) for value in request.args.getlist(name)
    ]
    filters = Filters(sorted(pairs))
    known = await datasette.get_database(database).table_columns(table)
    _check_selections(filters, [*known, *ROWID_NAMES])
    try:
        clauses, parameters = filters.build_where_clauses(table)
    except ValueError as error:  # An older Datasette takes a power of two for a number, say.
        raise BadRequest(f"A filter in the address cannot be read: {error}") from None
    words: list[str] = []
    for hook in pm.hook.filters_from_request(
        request=request, table=table, database=database, datasette=datasette
    ):
        try:
            more = await await_me_maybe(hook)
        except (ValueError, LookupError, TypeError) as error:  # ?_through= takes JSON, for one.
            raise BadRequest(f"A filter in the address cannot be read: {error}") from None
        if more:
            clauses += more.where_clauses
            parameters.update(more.params)
            words += more.human_descriptions
    if not clauses:
        return Filtered()
    words += [f"where {clause}" for clause in request.args.getlist("_where")]
    # Joined as the table's page joins them, without brackets: an "or" in one of them reaches as far there.
    where = with_literals(" and ".join(clauses), parameters)
    return Filtered(where, filters.human_description_en(extra=words))


def _check_selections(filters: Filters, columns: list[str]) -> None:
    known = {column.lower() for column in columns}
    for column, lookup, _ in filters.selections():
        if column.lower() not in known:
            raise BadRequest(f"The filter {column}__{lookup} is about no column of this table")
        if lookup not in LOOKUPS:
            raise BadRequest(f"There is no filter {lookup!r}, as in {column}__{lookup}")


async def check_filtered(database: Any, table: Table, filtered: Filtered) -> None:
    """Have SQLite read the condition.

    Raises:
        EnrichInputError: it is none that applies to this table.
    """
    if filtered.where is not None:
        await read(database, Selection(table, (), where=filtered.where).check)


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
