"""``datasette llm runs``: what is on record, for a person and as JSON."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result
from datasette.cli import cli

from .enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(tmp_path, "create table t (id integer primary key, body text)")
    file.run_many("insert into t (body) values (?)", [("one",), ("two",), ("two",), ("bad",)])
    yield file
    file.close()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["llm", *arguments])


def enrich(file: TableFile, *arguments: str) -> Result:
    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        yield "" if "bad" in prompt else prompt

    with fake_model(answer):
        return run("enrich", file.path, "t", "Say {{ body }}", "--model", "fake", *arguments)


def test_runs_are_listed_the_latest_first(file: TableFile) -> None:
    enrich(file, "--column", "answer", "--limit", "1")
    enrich(file, "--column", "answer", "--option", "temperature", "0.5", "--where", "id < 9")
    listed = run("runs", file.path, "t").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["2", "1"]
    assert "t (answer)  fake, 2 rows written, 1 failed, done" in listed[0]
    assert run("runs", file.path, "other").stdout == ""


def test_one_run_is_shown_with_its_failures_and_the_command_that_repeats_it(file: TableFile) -> None:
    enrich(file, "--column", "answer", "--option", "temperature", "0.5", "--where", "id < 9")
    shown = run("runs", file.path, "--run", "1").stdout
    assert "3 rows written, of these 1 with another row's answer and 0 with no value" in shown
    assert "1 x empty, for instance: the answer is empty" in shown
    words = shlex.split(shown.splitlines()[-1])
    assert words[words.index("enrich") :] == [
        "enrich", file.path, "t", "Say {{ body }}", "--model", "fake", "--column", "answer",
        "--where", "id < 9", "--purpose", "enrichments", "--option", "temperature", "0.5",
    ]  # fmt: skip


def test_as_data_a_list_of_runs_or_one_of_them(file: TableFile) -> None:
    enrich(file, "--column", "answer")
    (listed,) = json.loads(run("runs", file.path, "--json").stdout)
    shown = json.loads(run("runs", file.path, "--run", "1", "--json").stdout)
    assert shown == listed
    assert (shown["written"], shown["columns"], shown["prompt"]) == (3, ["answer"], "Say {{ body }}")


def test_nothing_on_record(file: TableFile) -> None:
    assert (run("runs", file.path).exit_code, run("runs", file.path).stdout) == (0, "")
    assert "No run is on record" in run("runs", file.path).stderr
    missing = run("runs", file.path, "--run", "3")
    assert (missing.exit_code, "leave --run out" in missing.stderr) == (2, True)
