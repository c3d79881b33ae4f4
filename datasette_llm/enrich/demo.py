"""The first thing a newcomer runs: a small real table, and a model that needs no key and no network.

The table is of 3,376 airports where the package vega_datasets is installed, and otherwise of 2,000
letters and signs from Python's own Unicode database.
"""

from __future__ import annotations

import csv
import importlib.util
import sqlite3
import sys
import unicodedata
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datasette_llm.hookspecs import plugin_manager

from .errors import EnrichInputError
from .spec import JobSpec
from .sql import quote
from .telling.invocation import datasette_command

if TYPE_CHECKING:
    from collections.abc import Iterator

COLUMN = "summary"
CHARACTERS = 2_000
SHOWN_ROWS = 4

# llm-echo answers with the prompt and its settings as JSON, unless the prompt is JSON with "raw".
_AIRPORT_PROMPT = (
    '{{ {"raw": name ~ " (" ~ iata ~ ") is an airport in " ~ city ~ ", " ~ state ~ ", at "'
    ' ~ latitude|round(1) ~ " degrees north."}|tojson }}'
)
_CHARACTER_PROMPT = '{{ {"raw": character ~ " is called " ~ name|title ~ "."}|tojson }}'


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """What the demo is about to do, and the words around it."""

    path: str
    table: str
    spec: JobSpec
    introduction: str


def prepare(path: str) -> DemoPlan:
    """Build the demo's database, unless it is there already.

    Raises:
        EnrichInputError: llm-echo is missing, or there is another file at that path.
    """
    if importlib.util.find_spec("llm_echo") is None:
        raise EnrichInputError("The demo uses the model of llm-echo: pip install llm-echo")
    table, columns, prompt = (
        ("airports", ("iata text primary key", "name", "city", "state", "latitude real"), _AIRPORT_PROMPT)
        if _airports_csv() is not None
        else ("characters", ("character text primary key", "name", "category"), _CHARACTER_PROMPT)
    )
    file = Path(path)
    existed = file.exists()
    try:
        with closing(sqlite3.connect(file)) as conn:
            tables = {row[0] for row in conn.execute("select name from sqlite_master where type = 'table'")}
            if not tables & {"airports", "characters"}:
                if tables:
                    raise EnrichInputError(f"{path} holds other tables: give the demo a path of its own")
                _build(conn, table, columns)
            elif table not in tables:
                table, prompt = (
                    "characters" if table == "airports" else "airports",
                    (_CHARACTER_PROMPT if table == "airports" else _AIRPORT_PROMPT),
                )
            rows = conn.execute(f"select count(*) from {quote(table)}").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise EnrichInputError(f"{path} cannot be used for the demo: {error}") from None
    spec = JobSpec(database=file.stem, table=table, prompt=prompt, column=COLUMN, model="echo")
    command = datasette_command("llm", "enrich", path, table, prompt, "--column", COLUMN, "--model", "echo")
    verb = "has" if existed else "now has"
    introduction = (
        f"{path} {verb} a table {table} of {rows:,} rows. The demo runs this on it:\n\n  {command}\n"
    )
    return DemoPlan(path, table, spec, introduction)


@contextmanager
def without_policies() -> Iterator[list[str]]:
    """Leave out the plugins that decide about models and account for prompts; yield their names.

    They are for models that cost something: one that knows the price of every model refuses echo.
    """
    manager = plugin_manager()
    plugins = {
        impl.plugin_name: impl.plugin
        for hook in ("llm_filter_models", "llm_default_model", "llm_prompt_context", "llm_group_exit")
        for impl in getattr(manager.hook, hook).get_hookimpls()
    }
    for plugin in plugins.values():
        manager.unregister(plugin)
    try:
        yield sorted(plugins)
    finally:
        for name, plugin in plugins.items():
            manager.register(plugin, name=name)


def closing_rows(plan: DemoPlan) -> list[str]:
    """Return a few of the answers."""
    with closing(sqlite3.connect(plan.path)) as conn:
        sql = f"select {quote(COLUMN)} from {quote(plan.table)} where {quote(COLUMN)} is not null limit ?"
        return [str(row[0]) for row in conn.execute(sql, (SHOWN_ROWS,))]


def closing_words(plan: DemoPlan) -> str:
    """Return the last lines of the demo."""
    rows = "\n".join(f"  {text}" for text in closing_rows(plan))
    return (
        f"\nThe column {COLUMN} now says, for instance:\n{rows}\n\n"
        f"To use a model of your own, `{datasette_command('llm', 'models')}` lists them, and\n"
        f"`{datasette_command('llm', 'enrich', '--help')}` explains the command.\n\n"
        f"To see the table in your browser:\n  {datasette_command(plan.path)}"
    )


def _build(conn: sqlite3.Connection, table: str, columns: tuple[str, ...]) -> None:
    places = ", ".join("?" for _ in columns)
    with conn:
        conn.execute(f"create table {table} ({', '.join(columns)})")
        source = _airports() if table == "airports" else _characters()
        conn.executemany(f"insert into {table} values ({places})", source)


def _airports_csv() -> Path | None:
    # Found without importing the package, which would import pandas.
    spec = importlib.util.find_spec("vega_datasets")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "_data" / "airports.csv"
    return path if path.exists() else None


def _airports() -> Iterator[tuple[str, str, str, str, float]]:
    path = _airports_csv()
    assert path is not None
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["iata"], row["name"], row["city"], row["state"], float(row["latitude"])


def _characters() -> Iterator[tuple[str, str, str]]:
    found = 0
    for code in range(0xA1, sys.maxunicode):
        character = chr(code)
        name = unicodedata.name(character, "")
        if name and found < CHARACTERS:
            found += 1
            yield character, name, unicodedata.category(character)
