"""The server's state in a real browser: it follows what happens, and anybody can use it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from datasette.app import Datasette

from datasette_llm import LLM
from datasette_llm.enrich.spec import JobSpec
from datasette_llm.pages.jobs import is_possible, live

from ..fakes import FakeModel, registered
from ..hooks import hooked
from ..remote_workers import fake_workers
from .axe import needs_axe, violations
from .browser import Browser, needs_browser, open_browser
from .serving import served

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.system,
    needs_browser,
    pytest.mark.skipif(not is_possible(Datasette), reason="this Datasette has no background tasks"),
]

GROUPS, JOBS = 'table[data-rows="groups"]', 'table[data-rows="jobs"]'
WORKERS = 'table[data-rows="workers"]'
JOB = "/data/-/llm/jobs/1"
#: The tables as the server writes them, and as the script does.
WRITTEN = """
const request = new XMLHttpRequest(); request.open("GET", location.href, false); request.send();
const other = new DOMParser().parseFromString(request.responseText, "text/html");
const read = (page) => [...page.querySelectorAll('CELLS')].map((cell) => cell.textContent.trim());
return [read(other), read(document)];
"""
TAB, SPACE, ENTER = "\ue004", " ", "\ue007"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette serves its pages with it.


@needs_axe
async def test_it_follows_what_happens_and_can_be_used_with_the_keyboard(tmp_path: Any) -> None:
    go_on = anyio.Event()

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        if "wait" in prompt:
            await go_on.wait()
        if prompt.startswith("Answer"):
            raise ValueError("<b>not</b> today")
        yield "answer"

    async def begin_job() -> None:
        spec = JobSpec(database="data", table="words", prompt="Now {{ word }}", column="said", model="fake")
        await live.start(datasette, spec)

    def visit(browser: Browser, address: str) -> None:
        browser.goto(f"{address}/-/llm")
        browser.sees("testing", GROUPS)
        # It has begun since, and the page has found out by itself.
        anyio.from_thread.run(begin_job)
        browser.sees("data: words", JOBS)
        by_server, by_script = browser.run(WRITTEN.replace("CELLS", f"{JOBS} td"))
        assert by_script[:2] == by_server[:2] == ["data: words", "running"]
        assert browser.run(f"return document.querySelector('{JOBS} a').getAttribute('href')") == JOB
        for width in (1280, 360):
            browser.resize(width, 900)
            assert violations(browser) == []
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        # Nobody reloads the page.
        anyio.from_thread.run_sync(go_on.set)
        browser.sees("No group of prompts is running.")
        browser.sees("No job of this server is running.")
        browser.until(lambda: browser.run("return document.querySelector('dd[data-key]').textContent") == "4")
        by_server, by_script = browser.run(WRITTEN.replace("CELLS", 'table[data-rows="lanes"] td, dd'))
        assert by_server == by_script
        assert len(by_script) > 10

        browser.goto(f"{address}/-/llm")
        browser.run("document.querySelector('[data-updating] input').focus()")
        browser.press(SPACE)
        assert browser.run("return document.querySelector('[data-updating] input').checked") is False
        while browser.run("return document.activeElement.id") != "llm-target":
            browser.press(TAB)
        browser.press("fake")
        browser.press(TAB)
        browser.press(ENTER)
        browser.sees("fake did not answer", "[data-result]")
        browser.sees("ValueError: <b>not</b> today", "[data-result]")
        assert violations(browser) == []

    settings = {"default_model": "fake", "prices": {"fake": {"input": 411_523, "output": 0}}}
    with closing(sqlite3.connect(tmp_path / "data.db")) as conn, conn:
        conn.execute("create table words (id integer primary key, word text)")
        conn.execute("insert into words (word) values ('wait')")
    datasette = Datasette([str(tmp_path / "data.db")], config={"plugins": {"datasette-llm": settings}})
    datasette.root_enabled = True
    with (
        registered(FakeModel(script)),
        hooked(actor_from_request=lambda request: {"id": "root"}),
        open_browser() as browser,
    ):
        async with served(datasette) as address, anyio.create_task_group() as tasks:

            async def job() -> None:
                async with LLM(datasette).group("fake", purpose="testing") as model:
                    async for _, response in model.map(["one", "two", "wait"]):
                        assert await response.text() == "answer"

            tasks.start_soon(job)
            await anyio.to_thread.run_sync(visit, browser, address)


async def test_workers_are_shown_while_they_come_answer_and_go(tmp_path: Any) -> None:
    go_on = anyio.Event()

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        await go_on.wait()
        yield "answer"

    def visit(browser: Browser, address: str) -> None:
        browser.goto(f"{address}/-/llm")
        browser.sees("near", WORKERS)
        for width in (1280, 360):
            browser.resize(width, 900)
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        anyio.from_thread.run(workers.kill, "far")
        browser.until(lambda: _cells(browser) == ["near", "there", "2", "0", "far", "gone", "0", "0"])
        anyio.from_thread.run_sync(go_on.set)
        browser.until(lambda: _cells(browser)[:4] == ["near", "there", "0", "2"])

    datasette = Datasette(memory=True, config={"plugins": {"datasette-llm": {"default_model": "fake"}}})
    datasette.root_enabled = True
    with (
        registered(FakeModel(script)),
        hooked(actor_from_request=lambda request: {"id": "root"}),
        open_browser() as browser,
    ):
        async with (
            served(datasette) as address,
            fake_workers("near", "far") as workers,
            LLM(datasette).group("fake", workers=workers.spec) as group,
        ):
            responses = [await group.prompt("x") for _ in range(2)]
            await anyio.to_thread.run_sync(visit, browser, address)
            assert [await response.text() for response in responses] == ["answer"] * 2


def _cells(browser: Browser) -> list[str]:
    script = (
        f"return [...document.querySelectorAll('{WORKERS} tbody td')].map((cell) => cell.textContent.trim())"
    )
    found: list[str] = browser.run(script)
    return found
