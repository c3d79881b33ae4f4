"""What a person does with jobs, in a real browser, with axe-core looking at each page, wide and narrow.

A form, a mistake, a try, a run that is watched and paused, its server killed, going on, failed rows, a row.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from datasette.app import Datasette

from datasette_llm.pages.jobs import is_possible

from ..enrich_tables import TableFile
from ..patience import PATIENCE_SECONDS
from .axe import needs_axe, violations
from .browser import Browser, needs_browser, open_browser

pytest.importorskip("uvicorn")

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.system,
    needs_browser,
    needs_axe,
    pytest.mark.skipif(not is_possible(Datasette), reason="this Datasette has no background tasks"),
]

ROOT = Path(__file__).parents[2]
WORDS = [f"word {number}" for number in range(12)] + ["bad one", "bad two"]
LATER = [f"later {number}" for number in range(20)]
RUN = "button[value=run]"
TRY = "button[value=try]"
#: Where the screenshots of each page go, to be looked at.
SHOTS = os.environ.get("JOB_SCREENSHOTS")


@contextmanager
def serving(path: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the server; it is gone when the block is left."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.plugins.job_server", path, str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        yield server, int(server.stdout.readline())
    finally:
        if server.poll() is None:
            server.terminate()
        server.wait(PATIENCE_SECONDS)
        if server.stdout is not None:
            server.stdout.close()


def look(browser: Browser, name: str) -> None:
    """See that nothing is wrong with a page, wide and narrow."""
    for width in (360, 1280):
        browser.resize(width, 900)
        assert browser.run("return document.documentElement.scrollWidth") <= width, name
        if SHOTS:
            browser.screenshot(f"{SHOTS}/{name}-{width}.png")
        assert violations(browser) == [], name


def test_what_a_person_does(tmp_path: Path) -> None:
    file = TableFile(tmp_path, 'create table words (id integer primary key, word text, "odd name" text)')
    file.run_many("insert into words (word) values (?)", [(word,) for word in WORDS + LATER])
    file.run("insert into words (word) values ('never')")
    hold = tmp_path / "hold"
    hold.touch()
    with open_browser() as browser:
        with serving(file.path) as (server, port):
            address = f"http://127.0.0.1:{port}"
            start_a_job(browser, address, hold)
            browser.sees("Written\n12")
            server.send_signal(signal.SIGKILL)
            server.wait(PATIENCE_SECONDS)
        hold.unlink()
        job = browser.url
        with serving(file.path, port):
            go_on(browser, job)
            (tmp_path / "mended").touch()
            retry(browser, address)
    assert file.run("select count(*) from words where said = '<b>Say ' || word || '</b>!'") == [(34,)]
    assert file.run("select said from words where word = 'never'") == [(None,)]


def start_a_job(browser: Browser, address: str, hold: Path) -> None:
    browser.goto(f"{address}/data/words?word__not=never")
    browser.click("details.actions-menu-links summary")
    browser.click_link("Ask a language model about these rows")
    browser.sees('34 rows where word != "never"')
    look(browser, "form")

    browser.type("#prompt", "Say {{ wrd }}")
    browser.type("#column", "said")
    browser.click(RUN)
    browser.sees("did you mean 'word'?", "#prompt-error")
    assert browser.run("return document.activeElement.hasAttribute('data-focus')")
    assert browser.run("return document.querySelector('#column').value") == "said"
    look(browser, "mistake")

    browser.type("#prompt", "Say ")
    browser.click('button[data-insert="{{ word }}"]')
    assert browser.run("return document.querySelector('#prompt').value") == "Say {{ word }}"
    hold.rename(hold.with_name("waits"))
    browser.click(TRY)
    browser.sees("All of them: 34 rows to fake", "section")
    look(browser, "try")
    hold.with_name("waits").rename(hold)

    browser.click(RUN)
    browser.sees("Running", ".llm-badge")
    assert "/-/llm/jobs/1" in browser.url
    browser.run("window.same = true")
    browser.sees("Written\n12")
    browser.sees("Say word", ".llm-answers")
    look(browser, "running")
    assert browser.run("return window.same"), "it came without reloading"
    assert "<b>" in browser.text(".llm-answers")
    browser.goto(browser.url)
    browser.sees("Running", ".llm-badge")

    browser.click("form[action$=pause] button")
    browser.sees("Paused", ".llm-badge")
    look(browser, "paused")


def go_on(browser: Browser, job: str) -> None:
    browser.goto(job)
    browser.sees("Interrupted", ".llm-badge")
    look(browser, "interrupted")
    browser.click("form[action$=go-on] button")
    browser.until(lambda: "/-/llm/jobs/2" in browser.url)
    browser.sees("Done", ".llm-badge")
    browser.sees("the model has no answer", ".llm-failures")
    look(browser, "done")


def retry(browser: Browser, address: str) -> None:
    browser.click("form[action$=retry] button")
    browser.until(lambda: "/-/llm/jobs/3" in browser.url)
    browser.sees("Written\n2")
    browser.sees("Done", ".llm-badge")
    browser.click_link("See the result")
    browser.sees("<b>Say bad one</b>!", "table.rows-and-columns")

    browser.goto(f"{address}/data/words/13")
    browser.sees("said: fake,", ".llm-row-answers")
    browser.click_link("run 3")
    browser.sees("Job 3")
    browser.click_link("All jobs of data")
    browser.sees("Job 1: words")
    look(browser, "list")
