"""Identical questions are asked once: rows that ask what has been asked wait for that answer, or have it.

A question is in one of three states, told by its hash: unknown, so it is sent; asked, so further rows with
the same question wait; answered, so further rows have the answer at once. The answers of this run are kept
for as long as they are used, within a bound; those of earlier runs are found in the record.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .sql import SQLValue

R = TypeVar("R")

#: Answers kept, and how many characters of them: a few MB, and far more than the rows of a page, so that no
#: answer is forgotten between the page that was looked up before it came and the rows of that page.
MOST_ANSWERS = 5_000
MOST_CHARACTERS = 4_000_000
#: Rows that may wait for answers under way; then no more rows are read until one has come.
MOST_WAITING = 2_000


class Answer(NamedTuple):
    """What a question was answered with: values for the output columns, and the tokens that it took."""

    values: tuple[SQLValue, ...]
    input_tokens: int = 0
    output_tokens: int = 0


class Questions(Generic[R]):
    """The questions of one run: which are asked, who waits for them, and the latest answers.

    Args:
        reuse: whether identical questions are asked once at all.
    """

    def __init__(self, *, reuse: bool = True) -> None:
        self._reuse = reuse
        self._asked: dict[bytes, list[R]] = {}
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self._characters = 0
        self._waiting = 0
        self._room = anyio.Event()

    def answer_to(self, question: bytes) -> Answer | None:
        """Return what this question was answered with, if that is known."""
        answer = self._answers.get(question)
        if answer is not None:
            self._answers.move_to_end(question)
        return answer

    async def ask_or_wait(self, question: bytes, row: R) -> bool:
        """Say whether a row's question is to be sent; if not, the row waits for the answer under way.

        Whoever is told to send it says ``answered()`` or ``given_up()`` when it is known what came of it.
        Returns late while very many rows wait.
        """
        if not self._reuse:
            return True
        waiting = self._asked.get(question)
        if waiting is None:
            self._asked[question] = []
            return True
        waiting.append(row)
        self._waiting += 1
        while self._waiting >= MOST_WAITING:
            self._room = anyio.Event()
            await self._room.wait()
        return False

    def answered(self, question: bytes, answer: Answer) -> list[R]:
        """Take note of an answer. Returns the rows that waited for it."""
        if self._reuse:
            self._keep(question, answer)
        return self.given_up(question)

    def given_up(self, question: bytes) -> list[R]:
        """There will be no answer. Returns the rows that waited for it."""
        rows = self._asked.pop(question, [])
        self._waiting -= len(rows)
        if rows:
            self._room.set()
        return rows

    def learn(self, answers: Mapping[bytes, Answer]) -> None:
        """Take note of answers that earlier runs had."""
        for question, answer in answers.items():
            self._keep(question, answer)

    def _keep(self, question: bytes, answer: Answer) -> None:
        before = self._answers.pop(question, None)
        self._characters += _size(answer) - (0 if before is None else _size(before))
        self._answers[question] = answer
        while len(self._answers) > MOST_ANSWERS or (
            self._characters > MOST_CHARACTERS and len(self._answers) > 1
        ):
            self._characters -= _size(self._answers.popitem(last=False)[1])


def _size(answer: Answer) -> int:
    return sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in answer.values)
