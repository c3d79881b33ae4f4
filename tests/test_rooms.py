"""The picture of the house is a contract: imports go down from room to room, and nothing goes in circles."""

from __future__ import annotations

from pathlib import Path

import pytest

importlinter = pytest.importorskip("importlinter.cli")

PROJECT = Path(__file__).parent.parent


def test_imports_go_down_and_never_in_circles(capfd: pytest.CaptureFixture[str]) -> None:
    failed = importlinter.lint_imports(config_filename=str(PROJECT / "pyproject.toml"), no_cache=True)
    assert not failed, capfd.readouterr().out


def test_every_room_says_what_it_knows() -> None:
    package = PROJECT / "datasette_llm"
    for room in package.rglob("__init__.py"):
        if room.parent != package:
            assert room.read_text().startswith('"""'), room
