"""Identical questions are asked once, by themselves: who sends, who waits, and what is remembered."""

from __future__ import annotations

import anyio
import pytest

from datasette_llm.enrich import reuse
from datasette_llm.enrich.reuse import Answer, Questions


async def test_the_first_row_asks_and_the_others_wait_for_its_answer() -> None:
    questions: Questions[str] = Questions()
    assert await questions.ask_or_wait(b"q", "first")
    assert not await questions.ask_or_wait(b"q", "second")
    assert await questions.ask_or_wait(b"other", "third")
    assert questions.answer_to(b"q") is None
    assert questions.answered(b"q", Answer(("blue",))) == ["second"]
    assert questions.answer_to(b"q") == Answer(("blue",))


async def test_rows_whose_question_came_to_nothing_are_given_back_and_it_may_be_asked_again() -> None:
    questions: Questions[str] = Questions()
    await questions.ask_or_wait(b"q", "first")
    await questions.ask_or_wait(b"q", "second")
    assert questions.given_up(b"q") == ["second"]
    assert questions.answer_to(b"q") is None
    assert await questions.ask_or_wait(b"q", "again")


async def test_without_reuse_every_row_asks() -> None:
    questions: Questions[str] = Questions(reuse=False)
    assert await questions.ask_or_wait(b"q", "first")
    assert await questions.ask_or_wait(b"q", "second")
    assert questions.answered(b"q", Answer(("blue",))) == []
    assert questions.answer_to(b"q") is None


async def test_while_very_many_rows_wait_no_more_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "MOST_WAITING", 3)
    questions: Questions[int] = Questions()
    await questions.ask_or_wait(b"q", 0)
    read: list[int] = []

    async def pull() -> None:
        for number in range(1, 6):
            await questions.ask_or_wait(b"q", number)
            read.append(number)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pull)
        await anyio.wait_all_tasks_blocked()
        assert read == [1, 2]
        assert questions.answered(b"q", Answer(("blue",))) == [1, 2, 3]
    assert read == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 1_000])
def test_answers_are_remembered_within_a_bound_the_least_used_forgotten_first(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(reuse, "MOST_ANSWERS", 10 if size == 1 else 1_000)
    monkeypatch.setattr(reuse, "MOST_CHARACTERS", 10_000)
    questions: Questions[None] = Questions()
    questions.learn({b"used": Answer(("x" * size,))})
    for number in range(50):
        questions.learn({bytes([number]): Answer(("x" * size,))})
        assert questions.answer_to(b"used") == Answer(("x" * size,))
    assert questions.answer_to(bytes([49])) is not None
    assert questions.answer_to(bytes([0])) is None
    assert len(questions._answers) == 10


def test_one_answer_that_is_larger_than_all_that_is_kept_is_kept() -> None:
    questions: Questions[None] = Questions()
    questions.learn({b"small": Answer(("x",)), b"large": Answer(("x" * (reuse.MOST_CHARACTERS + 1),))})
    assert questions.answer_to(b"large") is not None
    assert questions.answer_to(b"small") is None
