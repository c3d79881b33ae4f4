"""``python -m benchmarks.kill``: what is lost and paid twice when an enrichment is killed, again and again.

Runs the real command, ``datasette llm enrich``, in a process of its own against a provider in this one,
over HTTP; kills it with SIGKILL at random moments (a seed decides) after its first answer; runs the same
command again. When a table is complete the next one is begun, and the last one is run to its end.

The provider writes down when each answer was sent, and the database is read between two runs, from a
copy: what a killed process leaves behind is for the next run to repair. So it is known for each kill
which answers were paid for and are not in the table, and how old the oldest of them was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio

from .killing import CONCURRENCY, Kill, Killer, Table, run_command, witness

if TYPE_CHECKING:
    from pathlib import Path

    from .provider import Provider

#: What is promised: a killed process has paid in vain for what this brought, and for what was in flight.
PROMISED_SECONDS = 0.5


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
        return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"median {median(values):.3g}, most {max(values):.3g}"


async def _kill(kills: int, rows: int, longest: float, seed: int, directory: Path) -> Found:
    found = Found()
    async with witness(directory, seed) as (provider, llm_directory):
        killer = Killer(provider, llm_directory, Random(seed), kills, longest)
        found.kills = killer.kills
        while killer.has_more:
            table = Table(directory, len(found.tables), rows)
            found.tables.append(table)
            said = await killer.fill(table, complete=True)
            if said or table.lost:
                found.problems.append(f"{table.path.name}: {said or 'it ended with rows to do'}")
                break
    found.judge(provider)
    return found


def kill_again_and_again(**given: Any) -> Found:
    """Do it; the arguments are those of the command line, and where files go."""
    return anyio.run(partial(_kill, **given))


if __name__ == "__main__":
    run_command("kill", __doc__, kill_again_and_again, kills=100, rows=2000, longest=1.5, seed=0)
