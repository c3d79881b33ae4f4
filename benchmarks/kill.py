"""``python -m benchmarks.kill``: what is lost and paid twice when an enrichment is killed, again and again.

Runs the real command, ``datasette llm enrich``, in a process of its own against a provider in this one,
over HTTP; kills it with SIGKILL at random moments (a seed decides) after its first answer; runs the same
command again. When a table is complete the next one is begun, and the last one is run to its end.

The provider writes down when each answer was sent, and the database is read between two runs, from a
copy: what a killed process leaves behind is for the next run to repair. So it is known for each kill
which answers were paid for and are not in the table, and how old the oldest of them was.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

import anyio

from .launch import ROOT, own_environment
from .provider import Provider, Settings, answer_text
from .wire import Connection

MODEL_ID = "loopback"
CONCURRENCY = 20
PROVIDER = Settings(latency=0.21, latency_sigma=0.18)
#: What is promised: a killed process has paid in vain for what this brought, and for what was in flight.
PROMISED_SECONDS = 0.5
#: Longer than this for the first answer, or for the rest of a table: it hangs.
PATIENCE_SECONDS = 120.0


class Witness(Provider):
    """A provider that writes down when it sent which answer.

    Attributes:
        answers: the moments and the prompts, in order, on ``time.monotonic()``.
        stirred: set with the next answer.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.answers: list[tuple[float, str]] = []
        self.stirred = anyio.Event()

    def sent(self, prompt: str) -> None:
        """Write it down, too."""
        super().sent(prompt)
        self.answers.append((time.monotonic(), prompt))
        self.stirred.set()


class Table:
    """A table in a database of its own, and what is known of it.

    Every second one has the output column already, with a trigger that counts each value that is written
    over another; the others get the column from the command, and are in SQLite's WAL mode.
    """

    def __init__(self, directory: Path, number: int, rows: int) -> None:
        self.path = directory / f"table{number}.db"
        self.rows = rows
        self.prompts = {key: f"table {number} row {key}" for key in range(1, rows + 1)}
        self.values: dict[int, str | None] = {}
        self.overwritten = 0
        self._copy = directory / "copy.db"
        watched = number % 2 == 0
        with closing(sqlite3.connect(self.path)) as database:
            if not watched:
                database.execute("pragma journal_mode = wal")
            more = ", answer text" if watched else ""
            database.execute(f"create table jobs (id integer primary key, text text{more})")
            database.executemany("insert into jobs (id, text) values (?, ?)", self.prompts.items())
            database.execute("create table overwritten (id integer)")
            if watched:
                database.execute(
                    "create trigger watch after update of answer on jobs when old.answer is not null "
                    "begin insert into overwritten values (old.id); end"
                )
            database.commit()
        self.look()

    def look(self) -> int:
        """Read the values, from a copy of the files. Returns how many are new."""
        before = self.values
        for suffix in ("", "-wal", "-journal"):
            source, target = Path(f"{self.path}{suffix}"), Path(f"{self._copy}{suffix}")
            if source.exists():
                shutil.copyfile(source, target)
            else:
                target.unlink(missing_ok=True)
        Path(f"{self._copy}-shm").unlink(missing_ok=True)
        with closing(sqlite3.connect(self._copy)) as database:
            columns = [row[1] for row in database.execute("pragma table_info(jobs)")]
            answer = "answer" if "answer" in columns else "null"
            self.values = dict(database.execute(f"select id, {answer} from jobs"))
            triggered = database.execute("select count(*) from overwritten").fetchone()[0]
        changed = sum(
            1 for key, value in before.items() if value is not None and self.values.get(key) != value
        )
        self.overwritten = max(self.overwritten + changed, triggered)
        return self.written - sum(value is not None for value in before.values())

    @property
    def written(self) -> int:
        """How many rows have a value."""
        return sum(value is not None for value in self.values.values())

    @property
    def wrong(self) -> int:
        """How many rows have a value that is not the answer to their own prompt."""
        return sum(
            value is not None and value != answer_text(self.prompts[key])
            for key, value in self.values.items()
        )

    @property
    def lost(self) -> int:
        """How many rows are gone, or have no value."""
        return sum(self.values.get(key) is None for key in self.prompts)

    def damage(self) -> list[str]:
        """Say what is wrong with the file, and which failures were recorded, at the end."""
        with closing(sqlite3.connect(self.path)) as database:
            found = [row[0] for row in database.execute("pragma integrity_check") if row[0] != "ok"]
            recorded = database.execute("select 1 from sqlite_master where name = '_llm_enrich_errors'")
            if recorded.fetchone():
                found += [str(row) for row in database.execute("select * from _llm_enrich_errors")]
        return found


@dataclass(frozen=True, slots=True)
class Kill:
    """One run that was killed.

    Attributes:
        seconds: from its first answer to its end.
        asked: requests that the provider got from it.
        answered: of these, answers sent in full.
        written: rows that got their value.
        oldest: how old, in seconds, the oldest answer was that is not in the table; 0 if there is none.
    """

    seconds: float
    asked: int
    answered: int
    written: int
    oldest: float

    @property
    def unwritten(self) -> int:
        """Answers that were paid for and lost."""
        return self.answered - self.written

    @property
    def in_flight(self) -> int:
        """Prompts that were asked and not answered; a provider may bill these too."""
        return self.asked - self.answered


@dataclass
class Found:
    """What came of it all.

    Attributes:
        kills: one for each process that was killed.
        tables: those that were filled.
        problems: what must not be.
        twice: prompts that were answered more than once.
        asked: requests at the provider.
        asked_twice: requests for prompts that had been asked before.
    """

    kills: list[Kill] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    twice: int = 0
    asked: int = 0
    asked_twice: int = 0

    def judge(self, provider: Provider) -> None:
        """Note what does not hold at the end."""
        seen, complete = provider.counts.seen, provider.counts.complete
        self.twice = sum(count - 1 for count in complete.values())
        self.asked = provider.counts.requests
        self.asked_twice = sum(count - 1 for count in seen.values())
        for table in self.tables:
            table.look()
            for name in ("lost", "wrong", "overwritten"):
                if count := getattr(table, name):
                    self.problems.append(f"{table.path.name}: {count} rows {name}")
            self.problems += [f"{table.path.name}: {what}" for what in table.damage()]
        for number, kill in enumerate(self.kills, 1):
            if kill.oldest > PROMISED_SECONDS:
                self.problems.append(f"kill {number}: an answer of {kill.oldest:.3f} s before is lost")
            if kill.in_flight > CONCURRENCY:
                self.problems.append(f"kill {number}: {kill.in_flight} prompts were in flight")
        explained = sum(kill.unwritten for kill in self.kills)
        if self.twice != explained and not any(table.lost for table in self.tables):
            self.problems.append(f"{self.twice} prompts paid twice, the kills explain {explained}")

    def __str__(self) -> str:
        unwritten = [float(kill.unwritten) for kill in self.kills]
        in_flight = [float(kill.in_flight) for kill in self.kills]
        oldest = [kill.oldest for kill in self.kills]
        rows = sum(table.rows for table in self.tables)
        lines = [
            f"{len(self.kills)} kills, {len(self.tables)} tables, {rows} rows",
            f"rows lost: {sum(table.lost for table in self.tables)}",
            f"rows with another row's answer: {sum(table.wrong for table in self.tables)}",
            f"rows overwritten: {sum(table.overwritten for table in self.tables)}",
            f"paid twice (answered more than once): {self.twice}; requests: {self.asked}",
        ]
        if self.kills:
            lines += [
                f"per kill: answered and not written: {_spread(unwritten)}",
                f"per kill: age of the oldest of these: {_spread(oldest)} s (promised: {PROMISED_SECONDS} s)",
                f"per kill: in flight, not answered: {_spread(in_flight)} (concurrency {CONCURRENCY})",
                f"per kill: seconds from first answer to kill: {_spread([k.seconds for k in self.kills])}",
                f"prompts asked again, in flight or not written: {self.asked_twice}",
            ]
        lines += [f"problem: {problem}" for problem in self.problems[:20]]
        return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"median {median(values):.3g}, most {max(values):.3g}"


async def live(
    table: Table,
    provider: Witness,
    llm_directory: Path,
    seconds: float | None,
    *options: str,
) -> Kill | str:
    """Run the command once, and kill it so long after its first answer (``None``: let it be).

    Args:
        options: more of the command line.

    Returns:
        the kill, or what it printed if it came to its own end.
    """
    requests, answers = provider.counts.requests, len(provider.answers)
    stirred = provider.stirred = anyio.Event()
    ended = anyio.Event()
    output = bytearray()
    process = await anyio.open_process(
        [
            *(sys.executable, "-m", "datasette", "llm", "enrich", str(table.path), "jobs", "{{ text }}"),
            *("--column", "answer", "--model", MODEL_ID, "--concurrency", str(CONCURRENCY), "--quiet"),
            *options,
        ],
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=own_environment(llm_directory),
    )
    stdout = process.stdout
    assert stdout is not None

    async def read() -> None:
        async for chunk in stdout:
            output.extend(chunk)
        ended.set()
        stirred.set()

    async with process:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                with anyio.move_on_after(PATIENCE_SECONDS):
                    await stirred.wait()
                began = time.monotonic()
                with anyio.move_on_after(PATIENCE_SECONDS if seconds is None else seconds):
                    await ended.wait()
                killed = time.monotonic()
                if not ended.is_set():
                    process.kill()
        except BaseException:
            process.kill()
            raise
        status = await process.wait()
    # Requests on their way when it died, and connections that the provider has not missed yet.
    while provider.counts.open_connections:  # noqa: ASYNC110 - only the kernel knows, for a moment
        await anyio.sleep(0.01)
    written = table.look()
    if status != -signal.SIGKILL:
        return f"exit code {status}: {output.decode(errors='replace')}" if status or output else ""
    sent = provider.answers[answers:]
    if not sent or seconds is None:
        return f"it hung, and said: {output.decode(errors='replace')}"
    has_value = {table.prompts[key] for key, value in table.values.items() if value is not None}
    ages = [killed - moment for moment, prompt in sent if prompt not in has_value]
    return Kill(
        seconds=killed - began,
        asked=provider.counts.requests - requests,
        answered=len(sent),
        written=written,
        oldest=max(ages, default=0.0),
    )


async def kill_again_and_again(kills: int, rows: int, longest: float, seed: int, directory: Path) -> Found:
    """Do it, in this directory.

    Args:
        kills: how many processes are killed.
        rows: how many rows a table has.
        longest: a process is killed at a random moment in so many seconds after its first answer.
        seed: decides the moments.
        directory: where databases and llm's files go.
    """
    random = Random(seed)
    found = Found()
    provider = Witness(PROVIDER.changed({"seed": seed}))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(provider), "127.0.0.1", 0)
    llm_directory = directory / "llm"
    llm_directory.mkdir()
    (llm_directory / "extra-openai-models.yaml").write_text(
        f"- model_id: {MODEL_ID}\n  model_name: bench\n"
        f"  api_base: http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1\n"
    )
    try:
        while len(found.kills) < kills or found.tables[-1].lost:
            if not found.tables or not found.tables[-1].lost:
                found.tables.append(Table(directory, len(found.tables), rows))
            table = found.tables[-1]
            moment = random.uniform(0, longest) if len(found.kills) < kills else None
            outcome = await live(table, provider, llm_directory, moment)
            if isinstance(outcome, Kill):
                found.kills.append(outcome)
                if len(found.kills) % 10 == 0:
                    print(f"{len(found.kills)} kills, {table.written} of {rows} rows", flush=True)
            elif table.lost or outcome:
                # It was told to be quiet: what it says is an error.
                found.problems.append(f"{table.path.name}: {outcome or 'it ended with rows to do'}")
                break
    finally:
        server.close()
    found.judge(provider)
    return found


def main() -> None:
    """Read the command line, run, and exit with 1 if something was lost, overwritten or paid in vain."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds from first answer to kill")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = anyio.run(
            kill_again_and_again, given.kills, given.rows, given.longest, given.seed, Path(directory)
        )
    print(found)
    sys.exit(1 if found.problems else 0)


if __name__ == "__main__":
    main()
