"""Texts that a command is given by name: a prompt in a file, a schema that llm knows or a file has."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from .options import InputProblem
from .templates import load

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEMPLATE_PREFIXES = ("template:", "t:")


def read_prompt(prompt: str) -> str:
    """Return the text of a prompt: ``-`` is standard input, ``@name`` a file, all else is the prompt.

    A prompt over a column that happens to begin with an at sign, ``@{{ user }}``, names no file.

    Raises:
        InputProblem: the file cannot be read.
    """
    if prompt == "-":
        return sys.stdin.read()
    if not prompt.startswith("@") or "{{" in prompt or "{%" in prompt:
        return prompt
    return _read_file(prompt[1:], "prompt")


def read_schema_argument(schema: str) -> str:
    """Return the schema that an argument means, as JSON text or in llm's concise syntax.

    As with llm's ``--schema``: JSON, concise syntax, ``t:NAME`` or ``template:NAME`` for the schema of a
    template, a file, or the id of a schema in llm's log database. One word that is none of these is one
    column, unless it looks like the name of a file.

    Raises:
        InputProblem: there is no such template, it has no schema, or the file cannot be read.
    """
    name = schema.strip()
    if name.startswith("{") or not name or any(sign in name for sign in ", \n"):
        return schema
    for prefix in _TEMPLATE_PREFIXES:
        if name.startswith(prefix):
            return _template_schema(name[len(prefix) :])
    if Path(name).is_file() or name.endswith(".json") or "/" in name:
        text = _read_file(name, "schema")
        try:
            json.loads(text)
        except ValueError as error:
            raise InputProblem(f"The schema in {name} is not valid JSON: {error}") from None
        return text
    return _logged_schema(name) or schema


def _read_file(name: str, what: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputProblem(f"The {what} cannot be read from {name!r}: {reason}") from None


def _template_schema(name: str) -> str:
    template = load(name)
    if not template.schema_object:
        raise InputProblem(f"llm's template {name!r} has no schema")
    return json.dumps(template.schema_object)


def _logged_schema(schema_id: str) -> str | None:
    """Return the schema of this id in llm's log database, which need not exist."""
    import llm

    path = llm.user_dir() / "logs.db"
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute("select content from schemas where id = ?", [schema_id]).fetchone()
    except sqlite3.Error:  # An older llm's database has no such table: then nothing has this id.
        return None
    return str(row[0]) if row else None


def find_model(queries: Sequence[str]) -> str:
    """Return the shortest id of a model in whose names all of these occur, as llm's ``-q`` finds it.

    Raises:
        InputProblem: there is none.
    """
    import llm

    found = [
        known.async_model.model_id
        for known in llm.get_models_with_aliases()
        if all(known.matches(query) for query in queries) and known.async_model is not None
    ]
    if not found:
        raise InputProblem(f"No model has {' and '.join(map(repr, queries))} in its id or aliases")
    return str(min(found, key=len))
