"""The picture of the house is a contract: imports go down from room to room, and nothing goes in circles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

PROJECT = Path(__file__).parent.parent

# In a process of its own: it configures logging anew, and disables every logger that there is.
LINT = "import importlinter.cli, sys; sys.exit(importlinter.cli.lint_imports(no_cache=True))"


def test_imports_go_down_and_never_in_circles() -> None:
    lint = subprocess.run(
        [sys.executable, "-c", LINT], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_every_room_says_what_it_knows() -> None:
    package = PROJECT / "datasette_llm"
    for room in package.rglob("__init__.py"):
        if room.parent != package:
            assert room.read_text().startswith('"""'), room
