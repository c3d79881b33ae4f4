"""Reading the rows of a job where a page holds fewer rows than were looked at."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from datasette_llm.enrich import EnrichJob, JobSpec
from datasette_llm.enrich.database import read
from datasette_llm.enrich.reading import selection
from datasette_llm.enrich.reading.pages import count_rows, first_rows, read_pages
from datasette_llm.enrich.reading.selection import NamedSelection, Selection
from datasette_llm.enrich.reading.table import read_table
from datasette_llm.enrich.spec import NamedRows

from .enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_clock


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(tmp_path, "create table t (id integer primary key, body text, said text)")
    file.run_many("insert into t (id, body) values (?, ?)", ((n, f"b{n}") for n in range(1, 1201)))
    yield file
    file.close()


async def named(
    file: TableFile, *ids: int, columns: tuple[str, ...] = ("id",)
) -> tuple[object, NamedSelection]:
    database = file.datasette().get_database("data")
    table = await read(database, partial(read_table, name="t"))
    rows = Selection(table, ("body",), ("said",))
    return database, NamedSelection(rows, columns, tuple((number,) for number in ids))


async def test_named_rows_come_in_the_order_of_their_names(file: TableFile) -> None:
    database, source = await named(file, 7, 3, 5_000, 5)
    assert [row.key async for page in read_pages(database, source) for row in page] == [(7,), (3,), (5,)]
    assert await count_rows(database, source) == 3


async def test_more_names_than_a_page(file: TableFile) -> None:
    database, source = await named(file, *range(1, 1201))
    assert len([row async for page in read_pages(database, source) for row in page]) == 1_200


async def test_big_rows_end_a_page(file: TableFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "PAGE_BYTES", 5)
    database, source = await named(file, *range(1, 8))
    assert [row.key[0] async for page in read_pages(database, source) for row in page] == list(range(1, 8))


async def test_rows_named_by_the_rowid(file: TableFile) -> None:
    database, source = await named(file, 2, 4, columns=("rowid",))
    assert [row.values["body"] async for page in read_pages(database, source) for row in page] == ["b2", "b4"]


async def test_the_first_rows_are_found_behind_those_that_are_done(file: TableFile) -> None:
    file.run("update t set said = 'x' where id <= 900")
    database, source = await named(file, *range(1, 1201))
    assert [row.key for row in await first_rows(database, source, 2)] == [(901,), (902,)]
    assert await first_rows(database, (await named(file, 1, 2))[1], 2) == []


async def test_a_job_about_named_rows(file: TableFile) -> None:
    file.run("update t set said = 'already' where id = 4")
    only = NamedRows(("id",), ((4,), (2,), (9,)))
    spec = JobSpec(database="data", table="t", prompt="{{ body }}", column="said", model="fake", only=only)
    with fake_model() as model:
        report = await EnrichJob(file.datasette(), spec).run()
    assert (report.written, report.total) == (2, 2)
    assert sorted(model.prompts) == ["b2", "b9"]


async def test_retrying_goes_on_behind_a_failure_that_somebody_has_mended(file: TableFile) -> None:
    async def script(prompt: str) -> AsyncGenerator[str, None]:
        raise ValueError("no")
        yield ""

    with fake_model(script):
        await file.enrich("t", "{{ body }}", column="said", where="id <= 3")
    file.run("update t set said = 'by hand' where id = 1")
    with fake_model():
        report = await file.enrich("t", "{{ body }}", column="said", retry_failed=True)
    assert report.written == 2
