"""One compact row for each value: which run gave it, for which question, and what it took."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from .keys import noted_key, noted_key_sql
from .tables import ANSWERS_TABLE, QUESTION_INDEX

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from .runs import RunId

_NOTE = f"""
insert into {ANSWERS_TABLE} (job, pk, run, question, input_tokens, output_tokens, seconds, no_value)
values (?, ?, ?, ?, ?, ?, ?, ?)
on conflict (job, pk) do update set
    run = excluded.run, question = excluded.question, input_tokens = excluded.input_tokens,
    output_tokens = excluded.output_tokens, seconds = excluded.seconds, no_value = excluded.no_value
"""


class Answered(NamedTuple):
    """A row that has its answer.

    Attributes:
        key: the row's key.
        question: the hash of what was asked.
        no_value: the answer was that there is none, which leaves the row's columns NULL.
    """

    key: Sequence[Any]
    question: bytes
    input_tokens: int | None = None
    output_tokens: int | None = None
    no_value: bool = False


def note_answers(conn: sqlite3.Connection, run: RunId, answers: Iterable[Answered]) -> None:
    """Record rows in the transaction that writes their values."""
    seconds = max(0, int(time.time()) - run.began)
    conn.executemany(
        _NOTE,
        [
            (
                run.job,
                noted_key(answer.key),
                run.run,
                answer.question,
                answer.input_tokens,
                answer.output_tokens,
                seconds,
                int(answer.no_value),
            )
            for answer in answers
        ],
    )


def forget_answers(conn: sqlite3.Connection, job: int, keys: Iterable[Sequence[Any]]) -> None:
    """Forget what rows were asked, since their values answer something that is not on record."""
    conn.executemany(
        f"delete from {ANSWERS_TABLE} where job = ? and pk = ?", [(job, noted_key(key)) for key in keys]
    )


def find_answered(conn: sqlite3.Connection, job: int, question: bytes) -> tuple[Any, int, int] | None:
    """Return a row of this job that was asked this very question: its noted key, tokens in and out."""
    sql = f"""
        select pk, coalesce(input_tokens, 0), coalesce(output_tokens, 0)
        from {ANSWERS_TABLE} indexed by {QUESTION_INDEX} -- SQLite would take the primary key
        where job = ? and substr(question, 1, 4) = ? and question = ? and not no_value limit 1
    """
    found = conn.execute(sql, (job, question[:4], question)).fetchone()
    return None if found is None else tuple(found)


def has_no_value_sql(job: int, key: Sequence[str]) -> str:
    """Return the SQL condition on a row: it was asked about, and the answer was that there is no value.

    Args:
        key: SQL expressions for the parts of the row's key, already quoted.
    """
    its = f"job = {int(job)} and pk = {noted_key_sql(key)}"
    return f"exists (select 1 from {ANSWERS_TABLE} where {its} and no_value)"


def is_answered_by_sql(job: int, key: Sequence[str], runs: Iterable[int]) -> str:
    """Return the SQL condition on a row: what it was last asked, it was asked by one of these runs."""
    its = f"job = {int(job)} and pk = {noted_key_sql(key)}"
    return f"exists (select 1 from {ANSWERS_TABLE} where {its} and run in ({', '.join(map(str, runs))}))"


def question_sql(job: int, key: Sequence[str]) -> str:
    """Return the SQL expression for the hash of the question that a row's value answers; NULL if unknown."""
    return f"(select question from {ANSWERS_TABLE} where job = {int(job)} and pk = {noted_key_sql(key)})"
