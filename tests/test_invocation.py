"""A command that is printed works where it is printed."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from datasette_llm.enrich.telling.invocation import datasette_command

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program ``datasette`` that was started, in a directory that is not on the path."""
    path = tmp_path / ("datasette.exe" if sys.platform == "win32" else "datasette")
    path.touch(mode=0o755)
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(sys, "argv", [str(path), "llm", "demo"])
    return path


def test_of_an_environment_that_is_not_active(program: Path) -> None:
    assert datasette_command("a b.db").endswith("datasette 'a b.db'")
    assert str(program.parent) in datasette_command()


def test_of_the_active_environment(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(program.parent))
    assert datasette_command("demo.db") == "datasette demo.db"


def test_run_by_uv(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert datasette_command("demo.db") == "uv run datasette demo.db"


def test_run_as_a_module(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(program.parent / "datasette" / "__main__.py")])
    assert datasette_command("demo.db").endswith("-m datasette demo.db")
    assert sys.executable.split(os.sep)[-1] in datasette_command("demo.db")


def test_run_by_something_else(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest"])
    assert datasette_command("demo.db") == "datasette demo.db"
