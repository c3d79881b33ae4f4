"""What a server does in bulk lets its pages go first."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from datasette_llm import enrich
from datasette_llm.backends import pages_first
from datasette_llm.backends.pages_first import GivingWay, PagesFirst, watching_pages

from .enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def pages() -> PagesFirst:
    return PagesFirst(anyio.current_time)


async def seconds_of(giving_way: GivingWay) -> float:
    began = anyio.current_time()
    await giving_way.wait()
    return anyio.current_time() - began


async def test_nobody_waits_where_no_page_is_being_made(pages: PagesFirst) -> None:
    giving_way = GivingWay(pages)
    assert await seconds_of(giving_way) == 0
    pages.begin("page")
    pages.end("page")
    assert await seconds_of(giving_way) == 0


async def test_a_job_waits_for_a_page(pages: PagesFirst) -> None:
    async with anyio.create_task_group() as tasks:
        pages.begin("page")

        async def make() -> None:
            await anyio.sleep(0.1)
            pages.end("page")

        tasks.start_soon(make)
        assert await seconds_of(GivingWay(pages)) == pytest.approx(0.1, abs=0.02)


async def test_however_many_pages_there_are_a_job_goes_on(pages: PagesFirst) -> None:
    giving_way = GivingWay(pages)
    pages.begin("first")
    assert await seconds_of(giving_way) == pytest.approx(0.5, abs=0.02)
    # Half of that time belongs to the job.
    pages.begin("second")
    assert await seconds_of(giving_way) == 0
    await anyio.sleep(0.26)
    pages.begin("third")
    assert await seconds_of(giving_way) == pytest.approx(0.5, abs=0.02)


async def test_a_page_that_takes_long_waits_for_something_else(pages: PagesFirst) -> None:
    pages.begin("page")
    await anyio.sleep(0.9)
    assert await seconds_of(GivingWay(pages)) == pytest.approx(0.1, abs=0.02)


async def test_a_page_that_runs_a_job_itself_is_not_waited_for(pages: PagesFirst) -> None:
    waited: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        waited.append(await seconds_of(GivingWay(pages)))

    await watching_pages(app, pages)({"type": "http"}, None, None)
    assert waited == [0]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_response_that_has_begun_is_no_page_that_is_being_made(
    pages: PagesFirst, fails: bool
) -> None:
    busy: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        busy.append(pages.are_busy())
        if fails:
            raise RuntimeError
        await send({"type": "http.response.start"})
        busy.append(pages.are_busy())
        await send({"type": "http.response.body"})

    async def send(message: Any) -> None:
        sent.append(message["type"])

    sent: list[str] = []
    if fails:
        with pytest.raises(RuntimeError):
            await watching_pages(app, pages)({"type": "http"}, None, send)
        assert (busy, sent) == ([True], [])
    else:
        await watching_pages(app, pages)({"type": "http"}, None, send)
        assert (busy, sent) == ([True, False], ["http.response.start", "http.response.body"])
    assert not pages.are_busy()
    busy.clear()
    fails = False
    await watching_pages(app, pages)({"type": "lifespan"}, None, send)
    assert busy == [False, False]


@pytest.mark.real_clock
async def test_an_enrichment_asks_nothing_while_a_page_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages_first, "GIVE_WAY_SECONDS", 3600.0)
    monkeypatch.setattr(pages_first, "PAGE_SECONDS", 3600.0)
    waited = anyio.Event()

    class Watched(GivingWay):
        async def wait(self) -> None:
            waited.set()
            await super().wait()

    monkeypatch.setattr(import_module("datasette_llm.enrich.asking"), "GivingWay", Watched)
    file = TableFile(
        tmp_path, "create table t (id integer primary key, text text)", "insert into t (text) values ('a')"
    )
    pages_first.pages_first.begin("page")
    try:
        with fake_model() as fake:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(
                    lambda: enrich(
                        file.datasette(), "data", "t", prompt="{{ text }}", column="answer", model="fake"
                    )
                )
                await waited.wait()
                for _ in range(20):
                    await anyio.lowlevel.checkpoint()
                assert fake.prompts == []
                pages_first.pages_first.end("page")
            assert len(fake.prompts) == 1
    finally:
        pages_first.pages_first.end("page")
        file.close()
