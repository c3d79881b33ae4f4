"""docs/errors.md has each message that a user can meet, and none that the package no longer says."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "datasette_llm"

#: What makes a message for somebody: exceptions, and the helpers that make them.
SPEAKS = re.compile(
    r"(Error|Exception|Problem|Cancelled|Closed|Running|Answer|Forbidden)$|^(_problem|_wrong|fail)$"
)
#: Python's own protocols, and what is caught inside: nobody reads these.
SILENT = {"AttributeError", "CannotShareError", "NotImplementedError", "SystemExit"}
VARIES = "…"
#: An entry may end early, but not before it can be told from others.
SHORTEST = 14


class Message(NamedTuple):
    where: str
    words: str


@functools.cache
def _said() -> tuple[list[Message], str]:
    """Return what is said where exceptions are made, and all literal texts of the package."""
    messages: set[Message] = set()
    literals = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                messages.update(Message(f"{where}:{node.lineno}", words) for words in _messages(node))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(" ".join(node.value.split()))
    return sorted(messages), " ".join(literals)


def _messages(call: ast.Call) -> Iterator[str]:
    """Yield what an exception says that is made here, with ``…`` for what is not literal."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if SPEAKS.search(name) and name not in SILENT:
        for argument in call.args:
            words = " ".join(re.sub(f"{VARIES}+", VARIES, _words(argument)).split())
            if re.search(r"\w \w", words.replace(VARIES, "")):
                yield words
                return


def _words(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _words(node.left) + _words(node.right)
    return VARIES


def _entries() -> list[str]:
    """Return the messages that the page has, in the order of the page."""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    return [" ".join(entry.split()) for entry in re.findall(r"\*\*(.+?)\*\*", text, re.DOTALL)]


def _is_begun_by(words: str, entry: str) -> bool:
    """Say whether an entry is a message, or as much of its beginning as is needed to find it."""
    beginning = entry.removesuffix(VARIES).rstrip()
    return words == entry or (len(beginning) >= SHORTEST and words.startswith(beginning))


def test_each_message_is_on_the_page() -> None:
    messages, _ = _said()
    entries = _entries()
    missing = [m for m in messages if not any(_is_begun_by(m.words, entry) for entry in entries)]
    assert not missing, (
        "docs/errors.md needs entries, each with the message or its beginning; … is for what differs:\n"
        + "\n".join(f"{message.where}: **{message.words}**" for message in missing)
    )


def test_each_entry_is_what_the_package_says() -> None:
    _, source = _said()
    unsaid = [
        entry for entry in _entries() if any(part.strip() not in source for part in entry.split(VARIES))
    ]
    assert not unsaid, "no message of the package has these words"


def test_why_a_job_stopped_early_is_on_the_page() -> None:
    from datasette_llm.enrich.telling.stopped import STOPPED

    assert set(STOPPED.values()) <= set(_entries())
