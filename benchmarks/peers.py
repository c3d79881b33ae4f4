"""``python -m benchmarks.peers``: ``map()`` against aiometer, pages beside a job, and each provider's plugin.

All of it by turns, three times, in about ten minutes; for a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from statistics import median

from . import families, report
from .__main__ import measuring
from .launch import running_server
from .scenarios import all_scenarios, per_prompt

PEERS = {"map": "aiometer", "map streamed": "aiometer streamed"}
PAGES = "enrich, 0.5 s an answer"


def main() -> int:
    """Measure and print the three tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    print(
        f"load when it began: {os.getloadavg()[0]:.1f}; {rounds} rounds, medians (least to most)\n",
        flush=True,
    )
    scenarios = {each.name: each for each in all_scenarios(quick=arguments.quick)}
    lines: list[tuple[str, ...]] = []
    with running_server() as server, measuring() as run:
        for name in ("steady", "wide", "faulty"):
            works = scenarios[name].works
            for ours, peer in PEERS.items():
                if ours not in works or peer not in works:
                    continue
                cpu, wall = [], []
                for _ in range(rounds):
                    pair = [run(replace(works[way], url=server.url)) for way in (ours, peer)]
                    if pair[0] is None or pair[1] is None:
                        continue
                    cpu.append(per_prompt(pair[0]) / per_prompt(pair[1]))
                    wall.append(pair[0].wall / pair[1].wall)
                lines.append((name, ours, _spread(cpu), _spread(wall)))
        print(
            report.text_table(("scenario", "way", "CPU / aiometer's", "wall / aiometer's"), lines), flush=True
        )
        pages = []
        for _ in range(rounds):
            result = run(replace(scenarios["page"].works[PAGES], url=server.url))
            if result is not None:
                pages.append(result.extra["busy"]["p99_ms"] / result.extra["idle"]["p99_ms"])
        print(f"\npage p99, {PAGES}: {_spread(pages)} x idle\n", flush=True)
    print(report.text_table(families.HEADINGS, list(families.table(rounds))), flush=True)
    return 0


def _spread(figures: list[float]) -> str:
    if not figures:
        return "failed"
    return f"{median(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"


if __name__ == "__main__":
    raise SystemExit(main())
