"""A real table and the prompts made of its rows: 3,376 airports of the United States."""

from __future__ import annotations

import csv
import sqlite3
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def _source() -> Path:
    # Importing vega_datasets imports pandas, half a second of it; the file is all that is wanted.
    found = find_spec("vega_datasets")
    if found is None or found.origin is None:
        raise RuntimeError("the benchmarks need the package vega-datasets")
    return Path(found.origin).parent / "_data" / "airports.csv"


# More prompts than airports: each question goes through the whole table again.
QUESTIONS = (
    "Describe the surroundings of {name} ({iata}) in {city}, {state}, at {latitude}, {longitude}.",
    "What is {name} ({iata}) in {city}, {state} named after?",
    "Which larger airport is nearest to {name} ({iata}) in {city}, {state}?",
)


def build_table(path: str | Path = ":memory:") -> sqlite3.Connection:
    """Write the table ``airports`` into an SQLite database and return the connection to it."""
    with _source().open(newline="", encoding="utf-8") as file:
        airports = list(csv.DictReader(file))
    columns = list(airports[0])
    database = sqlite3.connect(path)
    database.row_factory = sqlite3.Row
    database.execute(f"create table airports ({', '.join(columns)}, primary key (iata))")
    marks = ", ".join(f":{column}" for column in columns)
    database.executemany(f"insert into airports values ({marks})", airports)
    database.commit()
    return database


def prompts(count: int) -> list[str]:
    """Return this many prompts, no two alike.

    Raises:
        ValueError: if the table does not have so many.
    """
    found = list(islice(_all_prompts(), count))
    if len(found) < count:
        raise ValueError(f"there are only {len(found)} prompts")
    return found


def _all_prompts() -> Iterator[str]:
    database = build_table()
    try:
        for question in QUESTIONS:
            for row in database.execute("select * from airports order by iata"):
                yield question.format_map(dict(row))
    finally:
        database.close()
