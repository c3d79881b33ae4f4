"""The whole way through a job with nothing but the keyboard, in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ..enrich_tables import TableFile
from .axe import needs_axe, violations
from .browser import Browser, needs_browser, open_browser
from .test_jobs_browser import look, serving

pytest.importorskip("uvicorn")

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.system, needs_browser, needs_axe]

TAB, ENTER, DOWN, CONTROL = "\ue004", "\ue007", "\ue015", "\ue009"
#: More than there are places for the focus on any page.
MANY = 200


def reach(browser: Browser, css: str, key: str = TAB) -> None:
    """Go on with the tabulator until the focus is there, as somebody does who has no mouse."""
    for _ in range(MANY):
        if browser.run(f"return document.activeElement.matches({css!r})"):
            return
        browser.press(key)
    raise AssertionError(f"{css} cannot be reached: {browser.text()}")


def use(browser: Browser, css: str) -> None:
    """Press the button, or follow the link."""
    reach(browser, css)
    outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "it can be seen where the focus is"
    browser.press(ENTER)


def test_a_job_with_the_keyboard_alone(tmp_path: Path) -> None:
    file = TableFile(tmp_path, "create table words (id integer primary key, word text)")
    file.run("insert into words (word) values ('one'), ('bad two'), ('later three'), ('later four')")
    hold = tmp_path / "hold"
    with open_browser() as browser, serving(file.path) as (_, port):
        browser.resize(1280, 900)
        fill_in_the_form(browser, f"http://127.0.0.1:{port}", hold)
        have_it_pause_and_go_on(browser, hold)
        (tmp_path / "mended").touch()
        retry_and_look_at_a_row(browser)
        look_at_the_rest(browser, f"http://127.0.0.1:{port}")
    assert file.run("select count(*) from words where said = '<b>Say ' || word || '</b>!'") == [(4,)]


def fill_in_the_form(browser: Browser, address: str, hold: Path) -> None:
    browser.goto(f"{address}/data/words")
    use(browser, "details.actions-menu-links summary")
    reach(browser, "details.actions-menu-links a[href*='/-/llm/enrich/']", DOWN)  # Datasette's own menu.
    browser.press(ENTER)
    browser.sees("4 rows")
    reach(browser, "#prompt")
    browser.press("Say {{ wrd }}")
    reach(browser, "#column")
    browser.press("said")
    use(browser, "button[value=run]")
    browser.sees("did you mean 'word'?", "#prompt-error")
    assert browser.run("return document.activeElement.hasAttribute('data-focus')")
    use(browser, "a[href='#prompt']")
    browser.until(lambda: browser.run("return document.activeElement.id") == "prompt")
    browser.press_together(CONTROL, "a")
    browser.press("Say ")
    browser.run("document.activeElement.blur()")
    use(browser, "button[data-insert='{{ word }}']")
    assert browser.run("return document.activeElement.id") == "prompt"
    assert browser.run("return document.activeElement.value") == "Say {{ word }}"
    use(browser, "button[value=preview]")
    browser.sees("nothing was sent", "section")
    look(browser, "preview")
    browser.resize(1280, 900)
    use(browser, "button[value=try]")
    browser.sees("All of them: 4 rows to fake", "section")
    hold.touch()
    use(browser, "button[value=run]")
    browser.sees("Running", ".llm-badge")


def have_it_pause_and_go_on(browser: Browser, hold: Path) -> None:
    browser.sees("Written\n1")
    use(browser, "form[action$=pause] button")
    browser.sees("Paused", ".llm-badge")
    use(browser, "form[action$=resume] button")
    browser.sees("Running", ".llm-badge")
    # What is shown anew does not take the focus away.
    reach(browser, ".llm-answers a")
    hold.unlink()
    browser.sees("Done", ".llm-badge")
    browser.sees("the model has no answer", ".llm-failures")
    look(browser, "finished-with-failures")
    browser.resize(1280, 900)


def retry_and_look_at_a_row(browser: Browser) -> None:
    use(browser, "form[action$=retry] button")
    browser.until(lambda: "/-/llm/jobs/2" in browser.url)
    browser.sees("Done", ".llm-badge")
    look(browser, "retried")
    browser.resize(1280, 900)
    use(browser, "a[href*='said__notnull']")
    browser.sees("<b>Say bad two</b>!", "table.rows-and-columns")
    use(browser, "td a[href='/data/words/2']")
    browser.sees("said: fake,", ".llm-row-answers")
    for width in (360, 1280):
        browser.resize(width, 900)
        assert violations(browser, ".llm-row-answers") == []
        assert browser.run("return document.querySelector('.llm-row-answers').scrollWidth") <= width
    use(browser, ".llm-row-answers a")
    browser.sees("Job 2")


def look_at_the_rest(browser: Browser, address: str) -> None:
    browser.run("document.querySelector('form[action$=stale] button').click()")
    browser.sees("No row is waiting: nothing was sent.")
    look(browser, "nothing-waits")
    for name, path in (("nothing", "/data/-/llm/jobs/99"), ("filter", "/data/-/llm/enrich/words?gone=1")):
        browser.goto(address + path)
        browser.sees("Error 4")
        browser.resize(360, 900)
        assert browser.run("return document.documentElement.scrollWidth") <= 360, name
