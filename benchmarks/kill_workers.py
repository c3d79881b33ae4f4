"""``python -m benchmarks.kill_workers``: workers, or who has the rows, are killed in the middle of a job.

Runs jobs of ``datasette llm enrich --workers 2``, each in a process of its own, against a provider over
HTTP, and kills with SIGKILL at random moments: a random worker again and again within each job
(``--workers-killed``), or the command itself, which is then run again (``--commands-killed``). Counts what is
lost, written over, asked more often than it had to be, and processes that are left.
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

from .launch import ROOT, own_environment, running_server
from .workers import MODEL_ID, worker_processes, write_model

CONCURRENCY = 50
#: Processes end so soon after who started them.
LEFT_SECONDS = 10.0
PATIENCE_SECONDS = 300.0


class Job:
    """A table that is enriched by a command with workers."""

    def __init__(self, directory: Path, name: str, rows: int) -> None:
        self.path = directory / f"{name}.db"
        self.rows = rows
        self._environment = own_environment(directory)
        with closing(sqlite3.connect(self.path)) as database:
            database.execute("create table rows (id integer primary key, body text, answer text)")
            database.execute("create table overwritten (id integer)")
            database.execute(
                "create trigger watch after update of answer on rows when old.answer is not null "
                "begin insert into overwritten values (old.id); end"
            )
            database.executemany(
                "insert into rows (body) values (?)", [(f"{name} row {number}",) for number in range(rows)]
            )
            database.commit()

    def start(self) -> subprocess.Popen[bytes]:
        """Run the command."""
        command = [sys.executable, "-m", "datasette", "llm", "enrich", str(self.path), "rows", "{{ body }}"]
        command += [
            "--column",
            "answer",
            "-m",
            MODEL_ID,
            "--workers",
            "2",
            "--quiet",
            "--workers-timeout",
            "5m",
        ]
        command += ["--concurrency", str(CONCURRENCY)]
        return subprocess.Popen(command, cwd=ROOT, env=self._environment, stderr=subprocess.DEVNULL)

    def count(self, sql: str) -> int:
        """Return one number of the database."""
        with closing(sqlite3.connect(self.path, timeout=30)) as database:
            return int(database.execute(sql).fetchone()[0])

    @property
    def done(self) -> int:
        """How many rows have their answer."""
        return self.count("select count(*) from rows where answer = 'answer to: ' || body")


def wait_for(what: Any, seconds: float = PATIENCE_SECONDS) -> bool:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def gone(pids: list[int]) -> bool:
    """Say whether none of these processes is left."""
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def kill_workers(job: Job, kills: int, random: Random, until: float) -> dict[str, int]:
    """Kill workers within one job, each time when there are two."""
    process, killed, seen = job.start(), 0, list[int]()
    while process.poll() is None and killed < kills and time.monotonic() < until:
        time.sleep(random.uniform(0.2, 4.0))
        workers = worker_processes(process.pid)
        seen += workers
        if len(workers) == 2 and job.done:
            with suppress(ProcessLookupError):
                os.kill(random.choice(workers), signal.SIGKILL)
                killed += 1
            before = job.done

            def goes_on(before: int = before) -> bool:
                return len(worker_processes(process.pid)) == 2 and job.done > before

            wait_for(lambda: process.poll() is not None or goes_on(), 120)
    process.wait(PATIENCE_SECONDS)
    return {"killed": killed, "left": int(not wait_for(lambda: gone(seen), LEFT_SECONDS))}


def kill_commands(job: Job, kills: int, random: Random, until: float) -> dict[str, int]:
    """Kill the command when it has written something, and run it again; at last to its end."""
    killed = left = 0
    while killed < kills and job.done < job.rows and time.monotonic() < until:
        left += kill_one(job, random)
        killed += 1
    job.start().wait(PATIENCE_SECONDS)
    return {"killed": killed, "left": left}


def kill_one(job: Job, random: Random) -> int:
    """Run the command and kill it a moment after its first answer; say whether a worker is left."""
    before, process = job.done, job.start()
    wait_for(lambda: process.poll() is not None or job.done > before)
    time.sleep(random.uniform(0.0, 0.5))
    workers = worker_processes(process.pid)
    process.kill()
    process.wait()
    return int(not wait_for(lambda: gone(workers), LEFT_SECONDS))


def main() -> None:
    """Kill, count, print; exit status 1 if anything was lost, written over or left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers-killed", type=int, default=50)
    parser.add_argument("--commands-killed", type=int, default=20)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--latency", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=3600.0, help="kill no more after that")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    random, bad = Random(options.seed), 0
    with tempfile.TemporaryDirectory() as directory, running_server(latency=options.latency) as server:
        write_model(Path(directory), server.url)
        for name, kills, way in (
            ("workers", options.workers_killed, kill_workers),
            ("commands", options.commands_killed, kill_commands),
        ):
            until, told, jobs = time.monotonic() + options.seconds, Counter[str](), 0
            # A job may be done before there were as many kills: then there is another.
            while told["killed"] < kills and time.monotonic() < until:
                server.reset()
                job, jobs = Job(Path(directory), f"{name}{jobs}", options.rows), jobs + 1
                told.update(way(job, kills - told["killed"], random, until))
                seen, _ = server.prompts
                told["lost"] += job.rows - job.done
                told["written twice"] += job.count("select count(*) from overwritten")
                told["asked again"] += sum(seen.values()) - len(seen)
                print(
                    f"{name}, {jobs} jobs:",
                    dict(told),
                    f"at a kill at most {CONCURRENCY} in flight",
                    flush=True,
                )
            bad += told["lost"] + told["written twice"] + told["left"]
            bad += told["asked again"] > told["killed"] * CONCURRENCY
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
