"""Runs that are on record, for a person: one line each, or one of them whole."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from .invocation import datasette_words
from .words import counted, dollars

if TYPE_CHECKING:
    from collections.abc import Mapping

#: How much of a prompt is shown.
PROMPT_CHARACTERS = 400


def run_line(run: Mapping[str, Any]) -> str:
    """Return one line about a run."""
    columns = ", ".join(run["columns"])
    parts = [f"{run['id']:>4}  {run['started']}  {run['table']} ({columns})  {run['model']}"]
    parts.append(f"{counted(run['written'], 'row')} written")
    if run["failed"]:
        parts.append(f"{run['failed']:,} failed")
    if run["cost"] is not None:
        parts.append(dollars(run["cost"]))
    parts.append(_outcome(run))
    return ", ".join(parts)


def one_run(run: Mapping[str, Any], database: str) -> str:
    """Return all that is recorded of a run, and the command that asks the same again."""
    columns = ", ".join(run["columns"])
    reused = f"{run['reused']:,} with another row's answer"
    lines = [
        f"Run {run['id']}: {run['table']} ({columns}) with {run['model']}",
        f"Began {run['started']}" + (f" by {run['by']}" if run["by"] else "") + f", {_outcome(run)}",
        f"{counted(run['written'], 'row')} written, of these {reused} and {run['no_value']:,} with no value",
        f"{counted(run['failed'], 'row')} failed, {run['skipped']:,} skipped",
        f"{counted(run['input_tokens'], 'token')} in, {run['output_tokens']:,} out"
        + (f", {dollars(run['cost'])}" if run["cost"] is not None else ", no price known"),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in (run["versions"] or {}).items())
    lines += [f"Versions: {versions}"] if versions else []
    for name in ("system", "prompt"):
        if run[name]:
            text = str(run[name])
            shown = text if len(text) <= PROMPT_CHARACTERS else text[:PROMPT_CHARACTERS] + "..."
            lines.append(f"{name.capitalize()}: {shown}")
    for failure in run["failures"] or ():
        lines.append(f"  {failure['count']:,} x {failure['kind']}, for instance: {failure['example']}")
    lines.append(f"Ask the same again:\n  {repeat(run, database)}")
    return "\n".join(lines)


def repeat(run: Mapping[str, Any], database: str) -> str:
    """Return the command that does what a run did, for the rows that wait now."""
    spec = run["spec"] or {}
    words = [*datasette_words(), "llm", "enrich", database, run["table"], run["prompt"] or ""]
    words += ["--model", run["model"]]
    for name in ("column", "schema", "where", "purpose"):
        if spec.get(name):
            words += [f"--{name}", str(spec[name])]
    words += ["--system", run["system"]] if run["system"] else []
    for name, value in (run["options"] or {}).items():
        words += ["--option", name, str(value)]
    for source in spec.get("attachments") or ():
        words += ["--attachment", source]
    for name in ("extract", "overwrite", "retry_failed", "stale"):
        words += [f"--{name.replace('_', '-')}"] if spec.get(name) else []
    return shlex.join(words)


def _outcome(run: Mapping[str, Any]) -> str:
    if run["ended"] is None:
        return "under way, or its process was killed"
    return "done" if run["outcome"] == "done" else f"stopped early ({run['outcome']})"
