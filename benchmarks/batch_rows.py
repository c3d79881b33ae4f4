"""``python -m benchmarks.batch_rows``: what a job with batches takes: CPU, memory and rows a second.

Runs the real command twice, in a process of its own each time, against a provider of batches in this one:
once to submit and once to collect. Memory is read when a hundredth of the rows is through, and at the end.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from .batch_kill import HOUR
from .batch_provider import BatchProvider, Settings
from .killing import MODEL_ID, write_model
from .launch import ROOT, own_environment

PAUSE_SECONDS = 0.2
SUBMITTED = "select count(*) from _llm_enrich_batch_rows"
COLLECTED = "select count(*) from jobs where answer is not null"


@dataclass(frozen=True)
class Figures:
    """What one run took.

    Attributes:
        early: memory in MB when a hundredth was through.
        late: the last that was read before it ended.
        peak: the most that there was.
    """

    seconds: float
    cpu: float
    early: float
    late: float
    peak: float

    def line(self, what: str, rows: int) -> str:
        """Say it."""
        return (
            f"{what}: {rows:,} rows in {self.seconds:.1f} s ({rows / self.seconds:,.0f} rows/s), "
            f"{self.cpu / rows * 1000:.2f} ms CPU a row, RSS {self.early:.0f} MB at 1 %, "
            f"{self.late:.0f} MB at 100 %, peak {self.peak:.0f} MB"
        )


def _memory(pid: int, name: str) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    return 0.0


def _count(path: Path, sql: str) -> int:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        try:
            return int(database.execute(sql).fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def measure(path: Path, llm_directory: Path, rows: int, size: int, progress: str) -> Figures:
    """Run the command, and watch it."""
    began = time.monotonic()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "datasette", "llm", "enrich", str(path), "jobs", "{{ text }}"),
            *("--column", "answer", "--model", MODEL_ID, "--batch", "--batch-size", str(size), "--quiet"),
        ],
        cwd=ROOT,
        env=own_environment(llm_directory),
    )
    early = late = peak = 0.0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            break
        late = _memory(process.pid, "VmRSS") or late
        peak = _memory(process.pid, "VmHWM") or peak
        if not early and _count(path, progress) >= rows // 100:
            early = late
        time.sleep(PAUSE_SECONDS)
    assert process.returncode == 0
    return Figures(time.monotonic() - began, usage.ru_utime + usage.ru_stime, early, late, peak)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_rows", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=10_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, BatchProvider(Settings(seconds=HOUR)).running() as provider:
        directory = Path(name)
        path, llm_directory = directory / "jobs.db", directory / "llm"
        llm_directory.mkdir()
        write_model(llm_directory, f"{provider.url}/v1")
        with closing(sqlite3.connect(path)) as database:
            database.execute("pragma journal_mode = wal")
            database.execute("create table jobs (id integer primary key, text text)")
            database.executemany(
                "insert into jobs values (?, ?)",
                ((n, f"row {n}: " + "a text of some length " * 10) for n in range(given.rows)),
            )
            database.commit()
        for what, progress in (("submit", SUBMITTED), ("collect", COLLECTED)):
            figures = measure(path, llm_directory, given.rows, given.batch_size, progress)
            print(figures.line(what, given.rows), flush=True)
            provider.advance(2 * HOUR)
        assert _count(path, COLLECTED) == given.rows
        assert set(provider.asked.values()) == {1}


if __name__ == "__main__":
    main()
