"""docs/errors.md has each message that a user can meet, and none that the package no longer says."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

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


def _messages() -> Iterator[Message]:
    """Yield what is said where an exception is made, with ``…`` for what is not literal."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if SPEAKS.search(name) and name not in SILENT:
                for argument in node.args:
                    words = " ".join(re.sub(f"{VARIES}+", VARIES, _words(argument)).split())
                    if re.search(r"\w \w", words.replace(VARIES, "")):
                        yield Message(f"{path.relative_to(ROOT)}:{node.lineno}", words)
                        break


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


MESSAGES = sorted(set(_messages()))
ENTRIES = _entries()


def _is_begun_by(words: str, entry: str) -> bool:
    """Say whether an entry is a message, or as much of its beginning as is needed to find it."""
    beginning = entry.removesuffix(VARIES).rstrip()
    return words == entry or (len(beginning) >= SHORTEST and words.startswith(beginning))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.where)
def test_a_message_is_on_the_page(message: Message) -> None:
    assert any(_is_begun_by(message.words, entry) for entry in ENTRIES), (
        f"docs/errors.md needs an entry: **{message.words}**, or its beginning; … is for what differs"
    )


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_is_what_the_package_says(entry: str) -> None:
    source = " ".join(_literals())
    for part in entry.split(VARIES):
        assert part.strip() in source


def _literals() -> Iterator[str]:
    """Yield every text of the package, those that are put together as one."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield " ".join(node.value.split())


def test_why_a_job_stopped_early_is_on_the_page() -> None:
    from datasette_llm.enrich.telling.stopped import STOPPED

    assert set(STOPPED.values()) <= set(ENTRIES)
