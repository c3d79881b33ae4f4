"""Generators of other people are closed, and what they make of it is told."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from datasette_llm._compat import BaseExceptionGroup
from datasette_llm.backends.closing import close_quietly

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator


class Closes:
    """Something that ends like this when it is closed."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def aclose(self) -> None:
        raise self.error


async def test_a_task_group_around_a_yield_ends_as_it_should(caplog: pytest.LogCaptureFixture) -> None:
    async def numbers() -> AsyncGenerator[int, None]:
        async with _group():
            yield 1

    generator = numbers()
    assert await anext(generator) == 1
    await close_quietly(generator, "a generator")
    await close_quietly(iter([1]), "what cannot be closed")
    assert not caplog.records


@asynccontextmanager
async def _group() -> AsyncIterator[None]:
    try:
        yield
    except GeneratorExit as end:
        raise BaseExceptionGroup("as a task group has it", [end]) from None


@pytest.mark.parametrize("error", [ValueError("no"), BaseExceptionGroup("", [ValueError("no")])])
async def test_a_failure_is_logged(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    await close_quietly(Closes(error), "a generator")
    assert [record.getMessage() for record in caplog.records] == ["Closing a generator failed"]


async def test_what_stops_the_program_is_passed_on() -> None:
    with pytest.raises(BaseExceptionGroup):
        await close_quietly(Closes(BaseExceptionGroup("", [KeyboardInterrupt()])), "a generator")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await close_quietly(Closes(KeyError("its own")), "a generator")
