"""Batches: one row for each, from the first row that is put into it to the last that is taken out.

Two tables beside the record of answers. ``_llm_enrich_batches`` has one row for each batch that was ever
sent; ``_llm_enrich_batch_rows`` one compact row for each row that is in a batch *now*, and which question was
asked for it. A row leaves that table in the transaction that writes its value.

States of a batch:

* ``writing``: its file is being written. What is left of one like that is thrown away.
* ``prepared``: its file is complete, and nothing has been sent.
* ``creating``: the provider is being told to begin. Whether it has, only the provider knows: it is looked for
  there before anything is sent again.
* ``running``: the provider has it; ``batch`` is its id there.
* ``adopted``: the provider has one of its size and moment, which may be another's: its results tell.
* ``collected``, ``cancelled``, ``failed``: nothing is left in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .keys import noted_key, noted_key_sql

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from ..sql import SQLValue
    from .runs import RunId

BATCHES_TABLE = "_llm_enrich_batches"
ROWS_TABLE = "_llm_enrich_batch_rows"
QUESTION_INDEX = "_llm_enrich_batch_rows_question"

#: States in which rows are in a batch.
OPEN = ("writing", "prepared", "creating", "running", "adopted")

_COLUMNS = {
    "id": "integer primary key",
    "job": "integer not null",
    "run": "integer not null",
    "reference": "text not null",  # ours, in the provider's metadata
    "asked": "text not null",  # a hash of prompt, model, options and schema
    "provider": "text not null",
    "model": "text not null",
    "batch": "text",  # the provider's id
    "state": "text not null",
    "says": "text",  # the provider's own word for its state
    "requests": "integer not null default 0",
    "tokens": "integer not null default 0",  # about how many are sent
    "answered": "integer not null default 0",  # as the provider says
    "began": "integer not null",  # seconds since the epoch
    "attempted": "integer",  # when it was last tried to be begun at the provider
    "expires": "text",
    "ended": "text",
    "token_limit": "integer",  # how many may be enqueued, as a refusal said
    "error": "text",
}
_ROWS = f"""
create table if not exists {ROWS_TABLE} (
    job integer not null,
    pk not null,
    batch integer not null,
    question blob not null,
    primary key (job, pk)
) without rowid
"""
_INDEX = f"create index if not exists {QUESTION_INDEX} on {ROWS_TABLE} (job, substr(question, 1, 4))"


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch as it is recorded; the columns of the table explain each of these."""

    id: int
    run: int
    reference: str
    asked: str
    provider: str
    state: str
    batch: str | None
    says: str | None
    requests: int
    tokens: int
    answered: int
    attempted: int | None
    expires: str | None
    ended: str | None
    error: str | None

    @property
    def is_open(self) -> bool:
        """Whether rows are in it."""
        return self.state in OPEN


_FIELDS = tuple(each.name for each in fields(BatchRecord))


def make_batch_tables(conn: sqlite3.Connection) -> None:
    """Make the tables if need be. Runs in the caller's transaction, as all of this does."""
    declared = ", ".join(f'"{name}" {declaration}' for name, declaration in _COLUMNS.items())
    conn.execute(f"create table if not exists {BATCHES_TABLE} ({declared})")
    conn.execute(_ROWS)
    conn.execute(_INDEX)


def has_batches(conn: sqlite3.Connection) -> bool:
    """Say whether any batch was ever sent from this database."""
    sql = "select count(*) from sqlite_master where type = 'table' and name in (?, ?)"
    return bool(conn.execute(sql, (BATCHES_TABLE, ROWS_TABLE)).fetchone()[0] == 2)


def begin_batch(
    conn: sqlite3.Connection, run: RunId, *, reference: str, asked: str, provider: str, model: str
) -> int:
    """Record a batch whose file is about to be written; return its number."""
    make_batch_tables(conn)
    cursor = conn.execute(
        f"insert into {BATCHES_TABLE} (job, run, reference, asked, provider, model, state, began)"
        " values (?, ?, ?, ?, ?, ?, 'writing', ?)",
        (run.job, run.run, reference, asked, provider, model, int(time.time())),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def add_rows(
    conn: sqlite3.Connection, job: int, rows: Iterable[tuple[Sequence[SQLValue], bytes, int]]
) -> None:
    """Record rows that are in batches: of each the question, and the number of the batch."""
    conn.executemany(
        f"insert or ignore into {ROWS_TABLE} (job, pk, question, batch) values (?, ?, ?, ?)",
        [(job, noted_key(key), question, batch) for key, question, batch in rows],
    )


def release_orphans(conn: sqlite3.Connection, job: int) -> int:
    """Take rows out of batches that are over, should there be any; return how many."""
    if not has_batches(conn):
        return 0
    marks = ", ".join("?" for _ in OPEN)
    sql = f"""
        delete from {ROWS_TABLE} where job = ? and batch not in (
            select id from {BATCHES_TABLE} where state in ({marks})
        )
    """
    return conn.execute(sql, (job, *OPEN)).rowcount


def change_batch(conn: sqlite3.Connection, number: int, /, **values: Any) -> None:
    """Record what has become of a batch."""
    if values.get("state", OPEN[0]) not in OPEN:
        values["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sets = ", ".join(f'"{name}" = ?' for name in values)
    conn.execute(f"update {BATCHES_TABLE} set {sets} where id = ?", [*values.values(), number])


def release_rows(conn: sqlite3.Connection, batch: int) -> int:
    """Take the rows out of a batch, so that they wait again; return how many."""
    return conn.execute(f"delete from {ROWS_TABLE} where batch = ?", (batch,)).rowcount


def settle_rows(conn: sqlite3.Connection, job: int, keys: Iterable[Sequence[SQLValue]]) -> None:
    """Take rows out of their batches in the transaction that writes what came of them."""
    if has_batches(conn):
        sql = f"delete from {ROWS_TABLE} where job = ? and pk = ?"
        conn.executemany(sql, [(job, noted_key(key)) for key in keys])


def open_batches(conn: sqlite3.Connection, job: int) -> list[BatchRecord]:
    """Return the batches of a job that have rows in them: what expires first is first."""
    marks = ", ".join("?" for _ in OPEN)
    return _select(conn, f"job = ? and state in ({marks})", job, *OPEN)


def running_batches(conn: sqlite3.Connection) -> list[BatchRecord]:
    """Return the batches that a provider has, of all jobs: what expires first is first."""
    return _select(conn, "state in ('running', 'adopted') and batch is not null")


def batches_of_runs(conn: sqlite3.Connection, runs: Sequence[int]) -> dict[int, list[BatchRecord]]:
    """Return the batches that these runs have submitted, those of a run in the order in which it did."""
    marks = ", ".join("?" for _ in runs)
    found: dict[int, list[BatchRecord]] = {}
    for record in sorted(_select(conn, f"run in ({marks})", *runs), key=lambda each: each.id):
        found.setdefault(record.run, []).append(record)
    return found


def _select(conn: sqlite3.Connection, condition: str, *parameters: Any) -> list[BatchRecord]:
    if not has_batches(conn):
        return []
    names = ", ".join(f'"{name}"' for name in _FIELDS)
    found = conn.execute(
        f"select {names} from {BATCHES_TABLE} where {condition} order by expires is null, expires, id",
        parameters,
    )
    return [BatchRecord(*tuple(row)) for row in found]


def known_ids(conn: sqlite3.Connection) -> list[str]:
    """Return the providers' ids of all batches that are on record, and known to be these."""
    sql = f"select batch from {BATCHES_TABLE} where batch is not null and state <> 'adopted'"
    return [str(row[0]) for row in conn.execute(sql)] if has_batches(conn) else []


def token_limit(conn: sqlite3.Connection, provider: str, model: str) -> int | None:
    """Return how many tokens a provider lets be enqueued, as the latest refusal said."""
    if not has_batches(conn):
        return None
    sql = (
        f"select token_limit from {BATCHES_TABLE} where provider = ? and model = ?"
        " and token_limit is not null order by id desc limit 1"
    )
    found = conn.execute(sql, (provider, model)).fetchone()
    return None if found is None else int(found[0])


def find_asked(conn: sqlite3.Connection, job: int, questions: Iterable[bytes]) -> dict[bytes, int]:
    """Return the batches that these questions are in, of those that are in any."""
    sql = (
        f"select batch from {ROWS_TABLE} indexed by {QUESTION_INDEX}"
        " where job = ? and substr(question, 1, 4) = ? and question = ? limit 1"
    )
    found = {}
    for question in questions:
        row = conn.execute(sql, (job, question[:4], question)).fetchone()
        if row is not None:
            found[question] = int(row[0])
    return found


def is_asked_in(conn: sqlite3.Connection, batch: int, questions: Sequence[bytes]) -> bool:
    """Say whether any of these questions is in a batch. Looks through all rows that are in one."""
    marks = ", ".join("?" for _ in questions)
    sql = f"select 1 from {ROWS_TABLE} where batch = ? and question in ({marks}) limit 1"
    return conn.execute(sql, (batch, *questions)).fetchone() is not None


def rows_of(conn: sqlite3.Connection, job: int, batch: int, question: bytes) -> list[SQLValue]:
    """Return the noted keys of the rows in a batch that asked this."""
    sql = (
        f"select pk from {ROWS_TABLE} indexed by {QUESTION_INDEX}"
        " where job = ? and substr(question, 1, 4) = ? and question = ? and batch = ?"
    )
    return [row[0] for row in conn.execute(sql, (job, question[:4], question, batch))]


def count_submitted(conn: sqlite3.Connection, job: int, batch: int | None = None) -> int:
    """Return how many rows of a job are in batches, or in one of them."""
    if not has_batches(conn):
        return 0
    sql = f"select count(*) from {ROWS_TABLE} where job = ?"
    if batch is None:
        return int(conn.execute(sql, (job,)).fetchone()[0])
    return int(conn.execute(f"{sql} and batch = ?", (job, batch)).fetchone()[0])


def is_submitted_sql(job: int, key: Sequence[str]) -> str:
    """Return the SQL condition on a row: it is in a batch.

    Args:
        key: SQL expressions for the parts of the row's key, already quoted.
    """
    return f"exists (select 1 from {ROWS_TABLE} where job = {int(job)} and pk = {noted_key_sql(key)})"
