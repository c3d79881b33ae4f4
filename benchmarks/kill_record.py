"""What the record of answers is after ``kill -9``: does it ever disagree with the table?

    python -m benchmarks.kill_record --kills 50

A process is killed at a random moment while it fills a table, asks again about rows that were edited
(``--stale``), or fills one in which nine of ten rows ask what another one asks. After each kill the files are
copied and compared:

* a row has a value exactly where the record has an answer;
* the question on record is the one that this value answers;
* the last run's row counts the rows and tokens that its answers have, and the sum of all runs those written.

Exit code 1 if anything disagrees.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm.enrich.question import QuestionHasher

from .killing import MODEL_ID, Killer, Table, run_command, witness
from .provider import answer_text

if TYPE_CHECKING:
    from pathlib import Path

EDITED = 0.3
ALIKE = 10


def disagreements(copy: Path, asked: dict[int, set[str]], hasher: QuestionHasher) -> tuple[int, list[str]]:
    """Compare a table with its record. Returns how many rows were compared, and what disagrees.

    Args:
        copy: the database file.
        asked: for each row what its text is and was.
        hasher: makes the hash of a question.
    """
    with closing(sqlite3.connect(copy)) as database:
        if not database.execute("select 1 from sqlite_master where name = '_llm_runs'").fetchone():
            columns = [row[1] for row in database.execute("pragma table_info(jobs)")]
            sql = "select count(*) from jobs where answer is not null"
            values = database.execute(sql).fetchone()[0] if "answer" in columns else 0
            return 0, [f"{values} values and no record at all"] if values else []
        values = dict(database.execute("select id, answer from jobs where answer is not null"))
        noted = dict(database.execute("select pk, question from _llm_answers"))
        runs = database.execute("select id, written, input_tokens from _llm_runs order by id").fetchall()
        last, written, tokens = runs[-1]
        of_last = database.execute(
            "select count(*), coalesce(sum(input_tokens), 0) from _llm_answers where run = ?", (last,)
        ).fetchone()
    problems = [f"row {key}: a value and no record" for key in values.keys() - noted.keys()]
    problems += [f"row {key}: a record and no value" for key in noted.keys() - values.keys()]
    for key in values.keys() & noted.keys():
        prompts = [prompt for prompt in asked[key] if answer_text(prompt) == values[key]]
        if not any(hasher.digest(prompt) == noted[key] for prompt in prompts):
            problems.append(f"row {key}: the question on record is not what {values[key]!r} answers")
    if (written, tokens) != tuple(of_last):
        problems.append(f"run {last} counts {written} rows and {tokens} tokens, its answers are {of_last}")
    if sum(run[1] for run in runs) < len(noted):
        problems.append("the runs have written fewer rows than there are answers")
    return len(values), problems


def edit(table: Table, asked: dict[int, set[str]], random: Random, number: int) -> None:
    """Change the text of some rows, as somebody does between two runs."""
    keys = random.sample(sorted(table.prompts), int(table.rows * EDITED))
    with closing(sqlite3.connect(table.path)) as database, database:
        for key in keys:
            table.prompts[key] = f"{table.prompts[key].partition(' edited')[0]} edited {number}"
            asked[key].add(table.prompts[key])
            database.execute("update jobs set text = ? where id = ?", (table.prompts[key], key))


def make_alike(table: Table) -> None:
    """Have ten rows each ask the same."""
    with closing(sqlite3.connect(table.path)) as database, database:
        for key in table.prompts:
            table.prompts[key] = f"{table.path.stem} question {key // ALIKE}"
            database.execute("update jobs set text = ? where id = ?", (table.prompts[key], key))


@dataclass
class Found:
    """What came of it.

    Attributes:
        kills: by what was going on.
        compared: rows that were compared with the record, over all kills.
        problems: what disagrees.
    """

    kills: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    problems: list[str] = field(default_factory=list)

    def compare(self, step: str, table: Table, asked: dict[int, set[str]], hasher: QuestionHasher) -> None:
        """Note what disagrees in the copy of a table."""
        compared, problems = disagreements(table.copy, asked, hasher)
        self.compared += compared
        self.problems += [f"{table.path.name}, {step}: {problem}" for problem in problems]

    def __str__(self) -> str:
        return (
            f"{sum(self.kills.values())} kills: {self.kills}\n"
            f"rows compared with the record: {self.compared}; disagreements: {len(self.problems)}"
        )


async def _kill(kills: int, rows: int, longest: float, seed: int, directory: Path) -> Found:
    random, found = Random(seed), Found()
    hasher = QuestionHasher(MODEL_ID)
    async with witness(directory, seed) as (provider, llm_directory):
        killer = Killer(provider, llm_directory, random, kills, longest)
        number = 0
        while killer.has_more and not found.problems:
            table = Table(directory, number, rows)
            # Every second one has rows that ask the same, every one is edited when it is full.
            alike = bool(number % 2)
            if alike:
                make_alike(table)
            number += 1
            asked = {key: {prompt} for key, prompt in table.prompts.items()}
            for step in ("rows alike" if alike else "all rows", "stale rows"):
                compare = partial(found.compare, step, table, asked, hasher)
                before = len(killer.kills)
                if step == "stale rows":
                    edit(table, asked, random, number)
                    said = await killer.fill(table, "--stale", looked=compare)
                else:
                    said = await killer.fill(table, looked=compare)
                found.problems += [said] if said else []
                found.kills[step] = found.kills.get(step, 0) + len(killer.kills) - before
    return found


def kill_and_compare(**given: Any) -> Found:
    """Do it; the arguments are those of the command line, and where files go."""
    return anyio.run(partial(_kill, **given))


if __name__ == "__main__":
    run_command("kill_record", __doc__, kill_and_compare, kills=50, rows=600, longest=2.0, seed=0)
