"""``python -m benchmarks.start``: what this plugin adds to the start of Datasette.

Two starts are measured, each in a process of its own: ``datasette --version``, and a server up to its
first page (``datasette --get``). Beside them the same with a plugin that does nothing, with
datasette-secrets (which this plugin brings along), and what ``import llm`` takes: the plugin may add
0.1 seconds beyond that. The runs are interleaved, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from .launch import ROOT, own_environment
from .report import log, text_table

#: How much longer than with an empty plugin, beyond what `import llm` takes.
TARGET_SECONDS = 0.1
CONFIGURATION = """\
plugins:
  datasette-llm:
    default_model: gpt-4o-mini
    purposes:
      enrichments: {model: gpt-4o-mini}
"""
VERSION = ["-m", "datasette", "--version"]
PAGE = ["-m", "datasette", "serve", "--memory", "--get", "/-/versions.json"]


@dataclass
class Start:
    """One way to start, and how long each run of it took.

    Attributes:
        label: for the table.
        arguments: of Python.
        plugins: the distributions whose plugins Datasette loads.
        wall: seconds, for each run.
        cpu: the same in seconds of CPU.
    """

    label: str
    arguments: list[str]
    plugins: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, environment: dict[str, str]) -> None:
        """Start once, and wait for its end."""
        before, began = os.times(), time.perf_counter()
        subprocess.run(
            [sys.executable, *self.arguments],
            cwd=ROOT,
            env=environment | {"DATASETTE_LOAD_PLUGINS": self.plugins},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = os.times()
        self.wall.append(time.perf_counter() - began)
        self.cpu.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )


def make_starts(directory: Path) -> list[Start]:
    """Return what is measured; makes the empty plugin and a configuration in the directory."""
    (directory / "empty_plugin.py").write_text("", encoding="utf-8")
    information = directory / "empty_plugin-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: empty-plugin\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[datasette]\nempty = empty_plugin\n")
    config = directory / "datasette.yaml"
    config.write_text(CONFIGURATION, encoding="utf-8")
    ours = "datasette-llm,datasette-secrets"
    return [
        Start("import llm", ["-c", "import llm"], ""),
        Start("version, empty plugin", VERSION, "empty-plugin"),
        Start("version, datasette-secrets", VERSION, "datasette-secrets"),
        Start("version, datasette-llm", VERSION, ours),
        Start("page, empty plugin", PAGE, "empty-plugin"),
        Start("page, datasette-secrets", PAGE, "datasette-secrets"),
        Start("page, datasette-llm", PAGE, ours),
        Start("page, datasette-llm configured", [*PAGE, "--config", str(config)], ours),
    ]


def measure(runs: int) -> list[Start]:
    """Start each way so many times, in turns."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        starts = make_starts(directory)
        # Compiled modules are part of an installation, whatever this machine's environment says of them.
        compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(directory / "compiled")}
        environment = own_environment(name) | {"PYTHONPATH": name} | compiled
        for number in range(runs + 1):
            for start in starts:
                start.run(environment)
            if number == 0:  # The first of each compiled what was not compiled yet.
                for start in starts:
                    start.wall.clear()
                    start.cpu.clear()
            log(f"  run {number} of {runs}")
    return starts


def table(starts: list[Start]) -> str:
    """Return the medians, and what each start takes beyond the one with an empty plugin."""
    empty: dict[str, Start] = {}
    rows = []
    for start in starts:
        kind = start.label.partition(",")[0]
        empty.setdefault(kind, start)
        wall, cpu = median(start.wall), median(start.cpu)
        added = [wall - median(empty[kind].wall), cpu - median(empty[kind].cpu)]
        rows.append((start.label, *(f"{1000 * seconds:.0f}" for seconds in (wall, cpu, *added))))
    return text_table(("start", "wall ms", "CPU ms", "added wall ms", "added CPU ms"), rows)


def main() -> int:
    """Read the command line, measure, print the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    starts = measure(parser.parse_args().runs)
    print(table(starts))
    print(
        f"\nTarget: at most {1000 * TARGET_SECONDS:.0f} ms more than with the empty plugin and `import llm`."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
