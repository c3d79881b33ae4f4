"""Killing the real command, ``datasette llm enrich``, again and again: what the benchmarks that do so share.

The command runs in a process of its own against a provider in this one, over HTTP. A `Killer` runs it on a
table, kills it with SIGKILL at a random moment after its first answer, and runs the same command again, until
it comes to its own end or enough have been killed.

The provider writes down when each answer was sent, and the database is read between two runs, from a copy:
what a killed process leaves behind is for the next run to repair.
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
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio

from .launch import ROOT, own_environment
from .provider import Provider, Settings, answer_text
from .wire import Connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from random import Random

MODEL_ID = "loopback"
CONCURRENCY = 20
PROVIDER = Settings(latency=0.21, latency_sigma=0.18)
#: Longer than this for the first answer, or for the rest of a table: it hangs.
PATIENCE_SECONDS = 120.0
PROBLEMS_SHOWN = 20


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
        self.copy = directory / "copy.db"
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
            source, target = Path(f"{self.path}{suffix}"), Path(f"{self.copy}{suffix}")
            if source.exists():
                shutil.copyfile(source, target)
            else:
                target.unlink(missing_ok=True)
        Path(f"{self.copy}-shm").unlink(missing_ok=True)
        with closing(sqlite3.connect(self.copy)) as database:
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


@asynccontextmanager
async def witness(directory: Path, seed: int) -> AsyncIterator[tuple[Witness, Path]]:
    """Have a provider serve requests, and llm know it; yield it and the directory of llm's files."""
    provider = Witness(PROVIDER.changed({"seed": seed}))
    server = await asyncio.get_running_loop().create_server(lambda: Connection(provider), "127.0.0.1", 0)
    llm_directory = directory / "llm"
    llm_directory.mkdir()
    write_model(llm_directory, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    try:
        yield provider, llm_directory
    finally:
        server.close()


def write_model(llm_directory: Path, url: str) -> None:
    """Have llm know the provider at this address as the model `MODEL_ID`."""
    (llm_directory / "extra-openai-models.yaml").write_text(
        f"- model_id: {MODEL_ID}\n  model_name: bench\n  api_base: {url}\n"
    )


class Killer:
    """Kills so many processes.

    Attributes:
        kills: one for each that was killed.
    """

    def __init__(
        self, provider: Witness, llm_directory: Path, random: Random, kills: int, longest: float
    ) -> None:
        """Prepare to kill.

        Args:
            random: decides the moments.
            kills: how many processes are killed.
            longest: a process is killed at a random moment in so many seconds after its first answer.
        """
        self.kills: list[Kill] = []
        self._provider = provider
        self._llm_directory = llm_directory
        self._random = random
        self._most = kills
        self._longest = longest

    @property
    def has_more(self) -> bool:
        """Whether more are to be killed."""
        return len(self.kills) < self._most

    async def fill(
        self,
        table: Table,
        *options: str,
        complete: bool = False,
        looked: Callable[[], None] = lambda: None,
    ) -> str:
        """Run the command on a table again and again, until it ends by itself or enough were killed.

        Args:
            options: more of the command line.
            complete: let the last one come to its end.
            looked: called after each run, when the copy of the table has been made.

        Returns:
            what the command said when it ended by itself: it was told to be quiet, so that is an error.
        """
        while self.has_more or complete:
            moment = self._random.uniform(0, self._longest) if self.has_more else None
            outcome = await live(table, self._provider, self._llm_directory, moment, *options)
            looked()
            if not isinstance(outcome, Kill):
                return outcome
            self.kills.append(outcome)
            if len(self.kills) % 10 == 0:
                print(f"{len(self.kills)} kills, {table.written} of {table.rows} rows", flush=True)
        return ""


class HasProblems(Protocol):
    """What came of it, in words, and what must not be."""

    problems: list[str]


def run_command(module: str, doc: str | None, run: Callable[..., HasProblems], **options: float) -> None:
    """Read the command line, run, say what came of it, and exit with 1 if there is a problem.

    Args:
        run: called with the options as keywords, and ``directory``, where files go.
        options: of the command line, each with its default value.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=doc)
    for name, default in options.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=HELP[name]
        )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = run(**vars(given), directory=Path(directory))
    print(found)
    for problem in found.problems[:PROBLEMS_SHOWN]:
        print(f"problem: {problem}")
    sys.exit(1 if found.problems else 0)


HELP = {
    "kills": "how many processes are killed",
    "rows": "rows of a table",
    "longest": "seconds from first answer to kill",
    "batch_size": "rows of a batch",
    "seed": "decides the moments",
}
