"""The enrichment page in a real browser: choose, be corrected, start, pause, resume, see the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from ..fakes import FakeModel, registered
from ..hooks import hooked
from .browser import Browser, needs_browser, open_browser
from .enriching import ANA, Site, register
from .serving import served

pytest.importorskip("datasette_enrichments", reason="datasette-enrichments is not installed")

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = [pytest.mark.real_clock, pytest.mark.system, needs_browser]

SUBMIT = "form.core input[type=submit]"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette serves its pages with it.


async def test_a_job_from_choosing_it_to_its_result(tmp_path: Path) -> None:
    first_two = anyio.Event()
    go_on = anyio.Event()

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        if fake.counts["opened"] > 2:
            first_two.set()
            await go_on.wait()
        yield f"{prompt}!"

    def visit(browser: Browser, address: str) -> None:
        browser.goto(f"{address}/data/words?word__not=none")
        browser.click("details.actions-menu-links summary")
        browser.click_link("Enrich selected data")
        browser.sees("5 rows selected")
        browser.click_link("Prompt a language model about each row")
        browser.sees('{{ row["odd name"] }}')

        browser.type("#prompt", "Say {{ wrd }}")
        browser.type("#column", "said")
        browser.click(SUBMIT)
        browser.sees("did you mean 'word'?", ".field.errors")
        assert site.jobs() == 0

        browser.type("#prompt", "Say {{ word }}")
        browser.click(SUBMIT)
        browser.sees("Enrichment started")
        anyio.from_thread.run(first_two.wait)
        job_page = f"{address}/-/enrich/data/-/jobs/1"
        browser.goto(job_page)
        browser.click("input[value=Pause]")
        browser.sees("paused: by ana")
        browser.click("input[value=Resume]")
        anyio.from_thread.run_sync(go_on.set)
        browser.until(lambda: "status is finished" in browser.text(), page=job_page)
        browser.until(lambda: browser.run(BAR) == "5")
        browser.goto(f"{address}/data/words")
        browser.sees("Say five!", "table.rows-and-columns")

    fake = FakeModel(script)
    with registered(fake), hooked(actor_from_request=lambda request: ANA), open_browser() as browser:
        register()
        site = Site(
            tmp_path,
            'create table words (id integer primary key, word text, "odd name" text)',
            "insert into words (word) values ('one'), ('two'), ('three'), ('four'), ('five'), ('none')",
            settings={"concurrency": 2},
        )
        async with served(site.datasette) as address:
            await anyio.to_thread.run_sync(visit, browser, address)
    assert sorted(fake.prompts) == sorted(f"Say {word}" for word in ("one", "two", "three", "four", "five"))
    assert site.run("select said from words where id = 6") == [(None,)]


#: What the progress bar of the job's page says is done.
BAR = "return document.querySelector('job-progress').shadowRoot.querySelector('.completed-count').textContent"
