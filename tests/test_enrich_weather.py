"""A job whose provider is away: it waits, or stops with nothing lost and nothing created."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm.enrich.telling.weather import away_in_words
from datasette_llm.pace.outage import Away
from tests.enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

SCHEMA = "select sql from sqlite_master"

pytestmark = pytest.mark.real_clock


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(tmp_path, "create table items (id integer primary key, text)")
    file.run_many("insert into items (text) values (?)", [(f"item {number}",) for number in range(60)])
    yield file
    file.close()


async def never(prompt: str) -> AsyncGenerator[Any, None]:
    raise ConnectionRefusedError(111, "Connection refused")
    yield


async def test_a_provider_that_was_never_reached_leaves_the_file_as_it_was(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("datasette_llm.enrich.model"), "FIRST_CONTACT_SECONDS", 1.0)
    before = file.run(SCHEMA)
    with fake_model(never):
        report = await file.enrich("items", "{{ text }}", column="answer")
    assert report.stopped == "unreachable"
    assert (report.written, report.failed, report.remaining) == (0, 0, 60)
    assert "the connection is refused" in report.summary()
    assert "--outage-timeout" in report.summary()
    assert file.run(SCHEMA) == before


async def test_a_provider_that_goes_away_is_waited_for(file: TableFile) -> None:
    began: list[float] = []
    words: set[str] = set()

    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        began.append(anyio.current_time())
        # An answer first, then nothing for as long as a progress report or two are apart.
        if len(began) > 4 and anyio.current_time() - began[4] < 1.5:
            raise ConnectionRefusedError(111, "Connection refused")
        await anyio.sleep(0.05)
        yield prompt

    with fake_model(answer):
        report = await file.enrich(
            "items",
            "{{ text }}",
            column="answer",
            concurrency=4,
            on_progress=lambda progress: words.add(progress.waiting or ""),
        )
    assert (report.written, report.failed, report.stopped) == (60, 0, None)
    assert any("no connection to the provider since" in each for each in words)


def test_what_is_told_of_an_outage() -> None:
    away = Away("127.0.0.1:8099", "the connection is refused", 60.0, 7.2, True)
    assert away_in_words(away).startswith("no connection to 127.0.0.1:8099 since ")
    assert away_in_words(away).endswith(", next try in 8 s")
    assert away_in_words(away._replace(address=None, next_try=0.0)).endswith(", trying now")
