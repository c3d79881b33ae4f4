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

import argparse
import asyncio
import sqlite3
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import anyio

from datasette_llm.enrich.question import QuestionHasher

from .kill import MODEL_ID, PROVIDER, Kill, Table, Witness, live
from .provider import answer_text
from .wire import Connection

EDITED = 0.3
ALIKE = 10


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


async def kill_and_compare(kills: int, rows: int, longest: float, seed: int, directory: Path) -> Found:
    """Do it, in this directory; the arguments are those of ``benchmarks.kill``."""
    random, found = Random(seed), Found()
    provider = Witness(PROVIDER.changed({"seed": seed}))
    hasher = QuestionHasher(MODEL_ID)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(provider), "127.0.0.1", 0)
    llm_directory = directory / "llm"
    llm_directory.mkdir()
    (llm_directory / "extra-openai-models.yaml").write_text(
        f"- model_id: {MODEL_ID}\n  model_name: bench\n"
        f"  api_base: http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1\n"
    )
    try:
        number = 0
        while sum(found.kills.values()) < kills and not found.problems:
            table = Table(directory, number, rows)
            # Every second one has rows that ask the same, every one is edited when it is full.
            doing = "rows alike" if number % 2 else "all rows"
            if number % 2:
                make_alike(table)
            number += 1
            asked = {key: {prompt} for key, prompt in table.prompts.items()}
            for step in (doing, "stale rows"):
                options = ("--stale",) if step == "stale rows" else ()
                if options:
                    edit(table, asked, random, number)
                while sum(found.kills.values()) < kills:
                    outcome = await live(table, provider, llm_directory, random.uniform(0, longest), *options)
                    compared, problems = disagreements(table._copy, asked, hasher)
                    found.compared += compared
                    found.problems += [f"{table.path.name}, {step}: {problem}" for problem in problems]
                    if not isinstance(outcome, Kill):
                        found.problems += [outcome] if outcome else []
                        break
                    found.kills[step] = found.kills.get(step, 0) + 1
                    total = sum(found.kills.values())
                    if total % 10 == 0:
                        print(f"{total} kills, {len(found.problems)} disagreements", flush=True)
    finally:
        server.close()
    return found


def main() -> None:
    """Read the command line, run, and exit with 1 if anything disagrees."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_record", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds from first answer to kill")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = anyio.run(
            kill_and_compare, given.kills, given.rows, given.longest, given.seed, Path(directory)
        )
    print(f"{sum(found.kills.values())} kills: {found.kills}")
    print(f"rows compared with the record: {found.compared}; disagreements: {len(found.problems)}")
    for problem in found.problems[:20]:
        print(f"problem: {problem}")
    sys.exit(1 if found.problems else 0)


if __name__ == "__main__":
    main()
