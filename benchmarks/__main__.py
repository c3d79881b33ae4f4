"""``python -m benchmarks``: run the scenarios, print the tables, keep the results."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

from . import report
from .chart import write_chart
from .launch import ROOT, running_server
from .models import KEY
from .scenarios import Scenario, all_scenarios
from .work import Result

if TYPE_CHECKING:
    from .launch import Server
    from .work import Work

# Longer than any measurement takes on a slow machine; one that hangs must not hang the rest.
LONGEST_SECONDS = 900


def run_work(work: Work) -> Result:
    """Run one measurement in a process of its own.

    Only this package and what it needs are loaded as plugins, and no configuration or key of this
    machine is seen.
    """
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {
            "DATASETTE_LOAD_PLUGINS": "datasette-secrets,datasette-llm",
            "LLM_LOAD_PLUGINS": "",
            "LLM_USER_PATH": directory,
            "OPENAI_API_KEY": KEY,
        }
        command = [sys.executable, "-m", "benchmarks.measure", json.dumps(work.as_dict())]
        finished = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
            check=False,
        )
    if finished.returncode:
        raise RuntimeError(f"{work.way} failed:\n{finished.stderr}")
    return Result.from_dict(json.loads(finished.stdout.splitlines()[-1]))


def run_scenario(scenario: Scenario, backend: str, server: Server, runs: int) -> report.Outcome:
    """Run all ways of a scenario, one after the other, as often as asked."""
    measured: dict[str, list[Result]] = {}
    for _ in range(1 if scenario.once else runs):
        for label, work in scenario.works.items():
            report.log(f"  {scenario.name} on {backend}: {label}")
            try:
                result = run_work(replace(work, backend=backend, url=server.url))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                report.log(f"  could not be measured: {error}")
                continue
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

    outcomes = []
    with running_server() as server:
        for backend in backends:
            for scenario in scenarios:
                if backend not in scenario.backends or scenario.name not in (arguments.scenario or names):
                    continue
                outcome = run_scenario(scenario, backend, server, runs)
                outcomes.append(outcome)
                path = report.save([outcome], quick=arguments.quick, runs=runs)

    described = ", ".join(f"{name} {value}" for name, value in report.machine().items())
    print(f"{described}\n")
    print(report.text_table(report.HEADINGS, [line for each in outcomes for line in report.rows(each)]))
    print("\nplain llm was asked fewer prompts (N); its figures are scaled by that.\n")
    print(report.text_table(report.TARGET_HEADINGS, report.target_lines(outcomes)))
    if outcomes and arguments.write:
        kept = report.load(path, scenarios)
        report.write_readme(kept, runs)
        write_chart(kept, report.HERE / "chart.svg")
    return 0 if all(set(each.results) == set(each.scenario.works) for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
