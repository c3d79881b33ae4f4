"""Prompts and schemas that the command line names instead of spelling them out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import sqlite_utils
from llm.migrations import migrate

from datasette_llm.cli.inputs import read_prompt, read_schema_argument
from datasette_llm.cli.options import InputProblem

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = {"type": "object", "properties": {"mood": {"type": "string"}}}


def test_a_prompt_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Judge: {{ body }}")
    assert read_prompt(f"@{tmp_path / 'p.txt'}") == "Judge: {{ body }}"
    with pytest.raises(InputProblem, match="prompt cannot be read"):
        read_prompt("@missing.txt")


def test_an_at_sign_before_a_column_is_text() -> None:
    assert read_prompt("@{{ user }}") == "@{{ user }}"


def test_a_schema_comes_from_a_file(tmp_path: Path, llm_home: Path) -> None:
    path = tmp_path / "sch.json"
    path.write_text(json.dumps(SCHEMA))
    assert json.loads(read_schema_argument(str(path))) == SCHEMA
    path.write_text("mood")
    with pytest.raises(InputProblem, match="not valid JSON"):
        read_schema_argument(str(path))
    with pytest.raises(InputProblem, match="schema cannot be read"):
        read_schema_argument("missing.json")


@pytest.mark.parametrize("prefix", ["t:", "template:"])
def test_a_schema_comes_from_a_template(prefix: str, llm_home: Path) -> None:
    (llm_home / "templates" / "judge.yaml").write_text(json.dumps({"schema_object": SCHEMA}))
    (llm_home / "templates" / "plain.yaml").write_text("prompt: hello")
    assert json.loads(read_schema_argument(f"{prefix}judge")) == SCHEMA
    with pytest.raises(InputProblem, match="has no schema"):
        read_schema_argument(f"{prefix}plain")
    with pytest.raises(InputProblem, match="cannot be used"):
        read_schema_argument(f"{prefix}none")


def test_a_schema_comes_from_the_log_of_llm(llm_home: Path) -> None:
    db = sqlite_utils.Database(llm_home / "logs.db")
    migrate(db)
    with db.conn:
        db.conn.execute("insert into schemas (id, content) values (?, ?)", ["abc123", json.dumps(SCHEMA)])
    db.close()
    assert json.loads(read_schema_argument("abc123")) == SCHEMA


@pytest.mark.parametrize("schema", ["mood", "mood, score int", "t: the text", '{"type": "object"}'])
def test_what_is_spelled_out_stays_as_it_is(schema: str, llm_home: Path) -> None:
    assert read_schema_argument(schema) == schema
