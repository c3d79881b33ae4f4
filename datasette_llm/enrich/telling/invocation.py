"""What to type for ``datasette`` here, so that a command that is printed works as it is."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def datasette_words() -> list[str]:
    """Return how this ``datasette`` was started, as the words of a command line."""
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run`, for what it runs
        return ["uv", "run", "datasette"]
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return [sys.executable, "-m", "datasette"]
    found = shutil.which("datasette")
    if program.stem == "datasette" and program.exists() and not (found and program.samefile(found)):
        return [sys.argv[0]]  # of an environment that is not the active one
    return ["datasette"]


def datasette_command(*arguments: str) -> str:
    """Return a command line that starts this ``datasette`` with some arguments."""
    return shlex.join([*datasette_words(), *arguments])
