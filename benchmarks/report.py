"""The results as a table, as JSON, and as a section of ``README.md``."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .scenarios import per_prompt
from .work import Result

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .scenarios import Scenario

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PACKAGES = ("datasette", "llm", "openai", "anyio", "trio", "stamina")


@dataclass(frozen=True)
class Outcome:
    """A scenario on one backend, run."""

    scenario: Scenario
    backend: str
    results: dict[str, Result]

    @property
    def targets(self) -> list[tuple[str, float, float, bool]]:
        """Each target's text, limit, figure, and whether it is met."""
        found = []
        for target in self.scenario.targets:
            try:
                figure = target.figure(self.results)
            except KeyError:  # one of the measurements could not be made
                continue
            found.append((target.text, target.limit, figure, target.met(figure)))
        return found


def middle(results: list[Result]) -> Result:
    """Return the median of the times of several runs, with the worst of what went wrong in any."""
    chosen = sorted(results, key=lambda result: result.wall)[len(results) // 2]
    worst = max(results, key=lambda result: result.server.get("statuses", {}).get("429", 0))
    return replace(
        chosen,
        wall=median(result.wall for result in results),
        cpu=median(result.cpu for result in results),
        right=min(result.right for result in results),
        wrong=max(result.wrong for result in results),
        failed=max(result.failed for result in results),
        errors=max(results, key=lambda result: result.failed).errors,
        peak_mb=max(result.peak_mb for result in results),
        server=worst.server
        and worst.server | {"answered_twice": max(result.server["answered_twice"] for result in results)},
    )


def machine() -> dict[str, str]:
    """Describe the machine, without its name."""
    memory = "unknown"
    if hasattr(os, "sysconf"):
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": str(cores),
        "memory": memory,
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    } | {name: version(name) for name in PACKAGES}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


HEADINGS = ("scenario", "backend", "way", "N", "wall s", "x ideal", "CPU µs/prompt", "vs plain llm", "found")


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """Return the lines of the table for this outcome, in the order of the headings."""
    lines: list[tuple[str, ...]] = []
    plain = next((found for label, found in outcome.results.items() if label.startswith("plain")), None)
    for label, result in outcome.results.items():
        ideal = outcome.scenario.times_ideal(label, result)
        against = ""
        if plain is not None and result is not plain:
            faster = (plain.wall / plain.n) / (result.wall / result.n)
            against = f"{faster:.1f} x faster, CPU / {per_prompt(plain) / per_prompt(result):.1f}"
        lines.append(
            (
                outcome.scenario.name,
                outcome.backend,
                label,
                f"{result.n:,}",
                f"{result.wall:.2f}",
                f"{ideal:.2f}" if ideal else "",
                f"{result.cpu / result.n * 1e6:,.0f}" if outcome.scenario.name != "page" else "",
                against,
                found(result),
            )
        )
    return lines


def found(result: Result) -> str:
    """Say in a few words what else came of a measurement."""
    notes = []
    server, extra = result.server, result.extra
    if refusals := server.get("statuses", {}).get("429", 0):
        notes.append(f"{refusals} refused ({refusals / result.n:.1%})")
    if missing := result.n - result.right - result.wrong:
        notes.append(f"{missing} lost" if missing > 0 else f"{result.right} complete reads")
    if result.failed:
        errors = ", ".join(f"{count} {name}" for name, count in sorted(result.errors.items()))
        notes.append(f"{errors} after {server.get('requests', 0)} requests")
    if result.wrong:
        notes.append(f"{result.wrong} wrong")
    if server.get("answered_twice"):
        notes.append(f"{server['answered_twice']} answered twice")
    if extra.get("retries"):
        notes.append(f"{extra['retries']} retries")
    if extra.get("first_chunk"):
        notes.append(f"first chunk {extra['first_chunk'] * 1000:.0f} ms")
    if "20 %" in extra:
        notes.append(", ".join(f"{extra[mark]} MB at {mark}" for mark in ("1 %", "20 %", "100 %")))
    notes += [
        f"{name}: p50 {extra[name]['p50_ms']:.1f} ms, p99 {extra[name]['p99_ms']:.1f} ms"
        for name in ("idle", "busy")
        if name in extra
    ]
    if "lag" in extra:
        lag = extra["lag"]["busy"]
        notes.append(f"loop late: p99 {lag['p99_ms']:.1f} ms, longest {lag['longest_ms']:.0f} ms")
    return "; ".join(notes)


def text_table(headings: Iterable[str], lines: list[tuple[str, ...]]) -> str:
    """Return a table for a terminal."""
    table = [tuple(headings), *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def markdown_table(headings: Iterable[str], lines: list[tuple[str, ...]]) -> str:
    """Return a table for Markdown."""
    headings = list(headings)
    table = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def target_lines(outcomes: list[Outcome]) -> list[tuple[str, ...]]:
    """Return one line for each target of each outcome."""
    return [
        (
            outcome.scenario.name,
            outcome.backend,
            text,
            f"{limit:g}",
            f"{figure:.3f}".rstrip("0").rstrip("."),
            "yes" if met else "**no**",
        )
        for outcome in outcomes
        for text, limit, figure, met in outcome.targets
    ]


TARGET_HEADINGS = ("scenario", "backend", "figure", "target", "measured", "met")


def save(outcomes: list[Outcome], *, quick: bool, runs: int) -> Path:
    """Add the results to the JSON file of this kind of run, and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("quick.json" if quick else "full.json")
    saved = json.loads(path.read_text()) if path.exists() else {}
    if saved.get("machine") != machine():
        saved = {"machine": machine(), "outcomes": {}}
    for outcome in outcomes:
        saved["outcomes"][f"{outcome.scenario.name}/{outcome.backend}"] = {
            "runs": 1 if outcome.scenario.once else runs,
            "results": {label: result.as_dict() for label, result in outcome.results.items()},
            "targets": outcome.targets,
        }
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return path


def load(path: Path, scenarios: list[Scenario]) -> list[Outcome]:
    """Return every outcome that the file has, in the order of the scenarios."""
    saved: dict[str, Any] = json.loads(path.read_text())["outcomes"]
    outcomes = []
    for backend in ("asyncio", "trio"):
        for scenario in scenarios:
            kept = saved.get(f"{scenario.name}/{backend}")
            if kept is None or set(kept["results"]) != set(scenario.works):
                continue
            results = {label: Result.from_dict(kept["results"][label]) for label in scenario.works}
            outcomes.append(Outcome(scenario, backend, results))
    return outcomes


def write_readme(outcomes: list[Outcome], runs: int) -> None:
    """Put the tables between the marks in ``README.md``."""
    described = ", ".join(f"{name} {value}" for name, value in machine().items())
    section = "\n".join(
        (
            BEGIN,
            "",
            f"Median of {runs} runs (memory: one). {described}.",
            "",
            "### Targets",
            "",
            markdown_table(TARGET_HEADINGS, target_lines(outcomes)),
            "",
            "### Everything measured",
            "",
            *(f"- **{scenario.name}**: {scenario.title}" for scenario in _scenarios(outcomes)),
            "",
            markdown_table(HEADINGS, [line for outcome in outcomes for line in rows(outcome)]),
            "",
            END,
        )
    )
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    README.write_text(before + section + rest.split(END, 1)[1], encoding="utf-8")


def _scenarios(outcomes: list[Outcome]) -> list[Scenario]:
    return list({outcome.scenario.name: outcome.scenario for outcome in outcomes}.values())


def log(line: str) -> None:
    """Say what is going on, beside the results."""
    print(line, file=sys.stderr, flush=True)
