"""The long runs, in short: what they find is nothing, and what they would find they notice."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.gauges import Books, Figures
from benchmarks.kill import Found
from benchmarks.killing import Kill, Table
from benchmarks.launch import ROOT
from benchmarks.load import Load
from benchmarks.provider import Provider, Settings, answer_text
from benchmarks.soak import violations
from datasette_llm import PromptCancelled

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.real_clock


def run(module: str, *arguments: str) -> str:
    """Run one of them as a contributor does, and return what it printed."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.system
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_short_soak_leaves_nothing(backend: str) -> None:
    printed = run("soak", "--minutes", "0.03", "--every", "1", "--workers", "4", "--backend", backend)
    assert "everything holds" in printed
    assert len([line for line in printed.splitlines() if line.endswith(("start", "end"))]) == 2


@pytest.mark.system
def test_a_job_that_is_killed_goes_on() -> None:
    printed = run("kill", "--kills", "1", "--rows", "40", "--longest", "0.3")
    assert printed.startswith("1 kills, ")
    assert "rows lost: 0" in printed
    assert "rows overwritten: 0" in printed


FIGURES = Figures(0, 100, 1, 5, 10, 1000, 7, 7, 7, 2, 2, 0, 0, 0)


def load() -> Load:
    facade: Any = None
    return Load(facade, Books())


@pytest.mark.parametrize(
    "change",
    [
        {"left": 6},
        {"exits": 1},
        {"reserved": 1},
        {"tasks": 6},
        {"fds": 11},
        {"in_flight": 1},
        {"connections": 1},
        {"gc_objects": 100_000},
        {"rss_mb": 900.0},
    ],
)
def test_a_soak_notices_what_is_left(change: dict[str, Any]) -> None:
    assert violations(FIGURES, FIGURES, Books(), load()) == []
    assert len(violations(FIGURES, replace(FIGURES, **change), Books(), load())) == 1


def test_a_soak_notices_wrong_answers_and_unexpected_errors() -> None:
    noticed = load()
    noticed.check("right", "right")
    noticed.fail(PromptCancelled())
    assert not noticed.problems
    noticed.check("another's", "mine")
    noticed.fail(KeyError("x"))
    assert len(noticed.problems) == 2
    assert len(violations(FIGURES, FIGURES, Books(), noticed)) == 1


def fill(table: Table, answers: dict[int, str]) -> None:
    with closing(sqlite3.connect(table.path)) as database:
        if "answer" not in [row[1] for row in database.execute("pragma table_info(jobs)")]:
            database.execute("alter table jobs add column answer text")
        for key, answer in answers.items():
            database.execute("update jobs set answer = ? where id = ?", [answer, key])
        database.commit()


@pytest.mark.parametrize("number", [0, 1])
def test_a_table_knows_what_happened_to_its_rows(tmp_path: Path, number: int) -> None:
    table = Table(tmp_path, number, 3)
    right = {key: answer_text(prompt) for key, prompt in table.prompts.items()}
    assert (table.written, table.lost, table.wrong, table.overwritten) == (0, 3, 0, 0)
    fill(table, {1: right[1], 2: right[1]})
    assert (table.look(), table.lost, table.wrong, table.overwritten) == (2, 1, 1, 0)
    fill(table, {2: right[2], 3: right[3]})
    assert (table.look(), table.lost, table.wrong, table.overwritten) == (1, 0, 0, 1)
    with closing(sqlite3.connect(table.path)) as database:
        database.execute("delete from jobs where id = 1")
        database.commit()
    table.look()
    assert table.lost == 1


def test_what_the_kills_do_not_explain_is_noticed(tmp_path: Path) -> None:
    table = Table(tmp_path, 0, 1)
    fill(table, {1: answer_text(table.prompts[1])})
    provider = Provider(Settings())
    provider.sent("a")
    provider.sent("a")
    explained = Found([Kill(1.0, 3, 2, 1, 0.2)], [table])
    explained.judge(provider)
    assert (explained.problems, explained.twice) == ([], 1)
    assert "paid twice (answered more than once): 1" in str(explained)
    late = Found([Kill(1.0, 50, 1, 1, 0.7)], [table])
    late.judge(provider)
    assert len(late.problems) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_the_provider_calls_each_tool_once(stream: bool) -> None:
    provider = Provider(Settings())
    function = {"name": "look_up", "parameters": {"properties": {"text": {"type": "string"}}}}
    request: dict[str, Any] = {
        "messages": [{"role": "user", "content": "p"}],
        "tools": [{"type": "function", "function": function}],
        "stream": stream,
    }
    first = b"".join(provider.answer(json.dumps(request).encode(), "").parts)
    assert b'"name": "look_up"' in first
    assert b'"tool_calls"' in first
    request["messages"] += [{"role": "assistant"}, {"role": "tool", "content": "found"}]
    second = b"".join(provider.answer(json.dumps(request).encode(), "").parts)
    assert b"tool_calls" not in second
