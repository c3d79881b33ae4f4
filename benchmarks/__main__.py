"""``python -m benchmarks``: run the scenarios, print the tables, keep the results."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from . import report
from .chart import write_chart
from .launch import ROOT, own_environment, running_server
from .models import KEY
from .scenarios import Scenario, all_scenarios
from .work import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .work import Work


@contextmanager
def measuring() -> Iterator[Callable[[Work], Result | None]]:
    """Yield a function that has a measurement made, each in a process of its own.

    Only this package and what it needs are loaded as plugins, and no configuration or key of this
    machine is seen. It returns ``None`` for a measurement that failed, which says why itself.
    """
    with tempfile.TemporaryDirectory() as directory:
        environment = own_environment(directory) | {"OPENAI_API_KEY": KEY}
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.measure"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None
            assert stdout is not None

            def run(work: Work) -> Result | None:
                if process.poll() is None:
                    print(json.dumps(work.as_dict()), file=stdin, flush=True)
                line = stdout.readline()
                if not line:
                    raise RuntimeError("the process that measures has ended")
                found = json.loads(line)
                return None if found is None else Result.from_dict(found)

            yield run
            stdin.close()


def run_scenario(
    scenario: Scenario, backend: str, run: Callable[[Work], Result | None], url: str, runs: int
) -> report.Outcome:
    """Run all ways of a scenario, one after the other, as often as asked."""
    measured: dict[str, list[Result]] = {}
    for _ in range(1 if scenario.once else runs):
        for label, work in scenario.works.items():
            report.log(f"  {scenario.name} on {backend}: {label}")
            result = run(replace(work, backend=backend, url=url))
            if result is not None:
                measured.setdefault(label, []).append(result)
    return report.Outcome(
        scenario, backend, {label: report.middle(results) for label, results in measured.items()}
    )


def main() -> int:
    """Read the command line and run; return 1 if a scenario could not be run."""
    names = [scenario.name for scenario in all_scenarios()]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--backend", choices=("asyncio", "trio", "all"), default="all")
    parser.add_argument("--scenario", action="append", choices=names, help="may be given several times")
    parser.add_argument("--quick", action="store_true", help="small numbers: within a minute per backend")
    parser.add_argument("--runs", type=int, help="the median of this many runs counts (3; quick: 1)")
    parser.add_argument("--write", action="store_true", help="update README.md and chart.svg beside this")
    arguments = parser.parse_args()
    runs = arguments.runs or (1 if arguments.quick else 3)
    scenarios = all_scenarios(quick=arguments.quick)
    backends = ("asyncio", "trio") if arguments.backend == "all" else (arguments.backend,)

    busy = os.getloadavg()[0]
    if busy > 0.5:
        report.log(f"This machine is busy (load {busy:.1f}): wall times will be longer, CPU times somewhat.")
    outcomes = []
    with running_server() as server, measuring() as run:
        for backend in backends:
            for scenario in scenarios:
                if backend not in scenario.backends or scenario.name not in (arguments.scenario or names):
                    continue
                outcome = run_scenario(scenario, backend, run, server.url, runs)
                outcomes.append(outcome)
                path = report.save([outcome], quick=arguments.quick, runs=runs)

    described = ", ".join(f"{name} {value}" for name, value in report.machine().items())
    print(f"{described}\n")
    print(report.text_table(report.HEADINGS, [line for each in outcomes for line in report.rows(each)]))
    print("\nplain llm was asked fewer prompts (N); its figures are scaled by that.")
    if arguments.quick:
        print("These were small numbers: starting up weighs more than in what the targets are meant for.")
    print()
    print(report.text_table(report.TARGET_HEADINGS, report.target_lines(outcomes)))
    if outcomes and arguments.write:
        kept = report.load(path, scenarios)
        report.write_readme(kept, runs)
        write_chart(kept, report.HERE / "chart.svg")
    return 0 if all(set(each.results) == set(each.scenario.works) for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
