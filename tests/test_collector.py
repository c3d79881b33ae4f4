"""What is left out of garbage collections while many prompts run, and that it is not for ever."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm.backends import collector
from datasette_llm.backends.collector import spare_older_objects
from datasette_llm.tasks.supervisor import MANY

from .fakes import FakeModel
from .test_map import group_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator


@pytest.fixture
def nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what conftest.py does for all tests."""
    monkeypatch.setattr(collector, "_frozen_by_others", False)
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_what_was_there_before_a_job_is_collected_after_it() -> None:
    class Node:
        other: Node

    node = Node()
    node.other = node
    alive = weakref.ref(node)

    with spare_older_objects():
        with spare_older_objects():
            assert gc.get_freeze_count() > collector.FROZEN_BY_PYTHON
        assert gc.get_freeze_count() > collector.FROZEN_BY_PYTHON
        del node
        gc.collect()
    assert gc.get_freeze_count() == 0
    assert alive() is not None
    gc.collect()
    assert alive() is None


@pytest.mark.usefixtures("nothing_frozen")
def test_jobs_that_always_overlap_keep_no_garbage_for_ever() -> None:
    class Node:
        other: Node

    made: weakref.WeakSet[Node] = weakref.WeakSet()
    running = spare_older_objects()
    running.__enter__()
    for _ in range(5):
        node = Node()
        node.other = node
        made.add(node)
        del node
        following = spare_older_objects()
        following.__enter__()  # The job before is still running: there is no moment without one.
        running.__exit__(None, None, None)
        running = following
    gc.collect()
    assert not made
    running.__exit__(None, None, None)
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("nothing_frozen")
def test_a_process_that_freezes_its_objects_meanwhile_keeps_them_frozen() -> None:
    kept: list[list[int]] = []
    try:
        with spare_older_objects():
            kept += ([number] for number in range(5_000))
            gc.freeze()
        assert gc.get_freeze_count() > collector.FROZEN_BY_PYTHON
    finally:
        gc.unfreeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_a_process_that_froze_its_objects_keeps_them_frozen() -> None:
    gc.freeze()
    try:
        with spare_older_objects():
            pass
        assert gc.get_freeze_count() > collector.FROZEN_BY_PYTHON
    finally:
        gc.unfreeze()


def spares() -> bool:
    return gc.get_freeze_count() > collector.FROZEN_BY_PYTHON


@pytest.mark.usefixtures("nothing_frozen")
class TestMap:
    async def test_spares_older_objects_while_it_runs(self) -> None:
        async with group_of(FakeModel()) as model:
            seen = [spares() async for _ in model.map(range(3))]
            assert not spares()
        assert seen == [True] * 3

    async def test_ends_that_when_it_is_left(self) -> None:
        async with group_of(FakeModel()) as model:
            pairs = model.map(range(3))
            await anext(pairs)
            assert spares()
            await pairs.aclose()
            assert not spares()

    async def test_ends_that_with_its_group(self) -> None:
        async with group_of(FakeModel()) as model:
            pairs: Any = model.map(range(3))
            await anext(pairs)
            assert spares()
        assert not spares()
        del pairs


@pytest.mark.usefixtures("nothing_frozen")
async def test_prompts_of_a_group_do_so_while_there_are_many() -> None:
    go_on = anyio.Event()

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        await go_on.wait()
        yield prompt

    async with group_of(FakeModel(script), concurrency=100) as model:
        responses = [await model.prompt(str(number)) for number in range(MANY - 1)]
        assert not spares()
        responses.append(await model.prompt("one more"))
        assert spares()
        go_on.set()
        for response in responses:
            await response.text()
        assert not spares()
