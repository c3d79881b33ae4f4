"""llm's templates and fragments, as what a job sends: their ``$variables`` are columns of its table."""

from __future__ import annotations

import json
import re
import sqlite3
import string
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import InputProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from llm import Template

# A brace that would begin something in Jinja, or might with what comes after this text.
_BRACE = re.compile(r"\{(?=[{%#]|\Z)")
# Names that Jinja takes for something else.
_RESERVED = {"row", "and", "or", "not", "in", "is", "if", "else"} | {
    form for word in ("true", "false", "none") for form in (word, word.capitalize())
}


@dataclass(frozen=True)
class Said:
    """What a command says to a model.

    Attributes:
        prompt: a Jinja template over the row; ``None`` if there is none yet.
        options: of the model.
        extract: which fenced block of an answer is its value, if it is one.
    """

    prompt: str | None = None
    system: str | None = None
    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    schema: str | None = None
    extract: str | None = None
    attachments: tuple[str, ...] = ()


def with_templates(
    said: Said,
    names: Sequence[str],
    *,
    fragments: Sequence[str] = (),
    parameters: Mapping[str, str],
    columns: Callable[[], Sequence[str]],
) -> Said:
    """Return what is said with these templates and fragments of llm, combined as llm does.

    What the command gives itself (model, options, system prompt, schema) goes before a template's.

    Args:
        fragments: come before the prompt, each on lines of its own.
        parameters: values for variables, instead of columns.
        columns: returns the names of the table's columns.

    Raises:
        InputProblem: there is no such template or fragment, or a job has no use for what is in it.
    """
    templates = [load(name) for name in names]
    before: list[str] = []
    of_system: list[str] = []
    for template in templates:
        before += template.fragments or []
        of_system += getattr(template, "system_fragments", None) or []
        said = _apply(said, template, parameters, columns)
    attachments = [literal(str(value)) for template in templates for value in template.attachments or []]
    texts = [literal(text) for text in read_fragments([*before, *fragments])]
    if said.prompt:
        texts.append(said.prompt)
    systems = [*read_fragments(of_system), said.system or ""]
    return replace(
        said,
        prompt="\n".join(texts) or None,
        system="\n\n".join(text.strip() for text in systems if text.strip()) if of_system else said.system,
        attachments=(*attachments, *said.attachments),
    )


def load(name: str) -> Template:
    """Return one of llm's templates.

    Raises:
        InputProblem: there is none of this name, or it cannot be read.
    """
    from llm.cli import LoadTemplateError, load_template

    try:
        template: Template = load_template(name)
    except (LoadTemplateError, click.ClickException, OSError, ValueError) as error:
        raise InputProblem(f"llm's template {name!r} cannot be used: {error}") from None
    return template


def read_fragments(names: Sequence[str]) -> list[str]:
    """Return the texts that llm knows by these names: aliases, hashes, files, URLs, ``loader:name``.

    Raises:
        InputProblem: there is none of such a name, or it cannot be read.
    """
    if not names:
        return []
    import llm
    import sqlite_utils
    from llm.cli import resolve_fragments
    from llm.migrations import migrate

    path = llm.user_dir() / "logs.db"
    known = sqlite_utils.Database(path) if path.exists() else sqlite_utils.Database(memory=True)
    with closing(known.conn):
        migrate(known)
        texts = []
        for name in names:
            try:
                texts += [str(text) for text in resolve_fragments(known, [name])]
            except Exception as error:  # Of a loader, an HTTP client, the disk: whatever the name leads to.
                raise InputProblem(f"The fragment {name!r} cannot be used: {error}") from None
    return texts


def literal(text: str) -> str:
    """Return a text as a template that renders to it."""
    return _BRACE.sub("{{ '{' }}", text)


def columns_of(database: str, table: str) -> list[str]:
    """Return the names of a table's columns; none if it cannot be read, which the job will say better."""
    try:
        with closing(sqlite3.connect(f"{Path(database).resolve().as_uri()}?mode=ro", uri=True)) as conn:
            return [str(row[1]) for row in conn.execute("select * from pragma_table_xinfo(?)", (table,))]
    except sqlite3.Error:
        return []


def _apply(
    said: Said, template: Template, parameters: Mapping[str, str], columns: Callable[[], Sequence[str]]
) -> Said:
    if template.tools or template.functions:
        raise InputProblem(f"llm's template {template.name!r} has tools, which no answer of a row may call")
    if template.attachment_types:
        raise InputProblem(
            f"llm's template {template.name!r} says of what types its attachments are: here they are found, "
            "so list them under attachments"
        )
    values = {name: literal(str(value)) for name, value in (template.defaults or {}).items()}
    if values:
        values = {name: value for name, value in values.items() if name not in columns()}
    values.update({name: literal(value) for name, value in parameters.items()})
    if said.prompt:
        values["input"] = said.prompt
    prompt, uses_input = said.prompt, False
    if template.prompt:
        prompt, used = _filled(template.prompt, values)
        uses_input = "input" in used
        if said.prompt and not uses_input:
            prompt = f"{prompt}\n{said.prompt}"
    system = said.system
    if template.system and system is None:
        values.pop("input", None)
        system = _same_for_all(template, values)
    extract = said.extract or ("first" if template.extract else "last" if template.extract_last else None)
    schema = said.schema
    if schema is None and template.schema_object:
        schema = json.dumps(template.schema_object)
    return replace(
        said,
        prompt=prompt,
        system=system,
        model=said.model or template.model,
        options={**(template.options or {}), **said.options},
        schema=schema,
        extract=extract,
    )


def _filled(text: str, values: Mapping[str, str]) -> tuple[str, set[str]]:
    """Return a text of llm's as a template over the row, and which variables it has."""
    used: set[str] = set()

    def fill(match: re.Match[str]) -> str:
        name = match["named"] or match["braced"]
        if name is None:
            return "$" if match["escaped"] is not None else match[0]
        used.add(name)
        if name in values:
            return values[name]
        return f'{{{{ row["{name}"] }}}}' if name in _RESERVED else f"{{{{ {name} }}}}"

    parts: list[str] = []
    end = 0
    for match in string.Template.pattern.finditer(text):
        parts += [literal(text[end : match.start()]), fill(match)]
        end = match.end()
    return "".join([*parts, literal(text[end:])]), used


def _same_for_all(template: Template, values: Mapping[str, str]) -> str:
    """Return the system prompt of a template, which is no template over the row."""
    text = template.system or ""
    for match in string.Template.pattern.finditer(text):
        name = match["named"] or match["braced"]
        if name is not None and name not in values:
            raise InputProblem(
                f"The system prompt of llm's template {template.name!r} has ${name}, and it is the same for "
                f"every row: give a value with -p {name} VALUE, or put it into the prompt"
            )
    plain = {name: value.replace("{{ '{' }}", "{") for name, value in values.items()}
    return string.Template(text).safe_substitute(plain)
