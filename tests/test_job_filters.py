"""The rows of a table's page are the rows of the job that is started from it, whatever the filters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
from datasette.utils.asgi import Request

from datasette_llm.pages.jobs.filters import query_about_rows, read_filters

from .enrich_tables import TableFile, fake_model
from .job_site import ANA, ASK, BEN, FORM, site, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_clock

WORDS = [
    ("it's", "number", '["a", "b"]', 1),
    ('say "hi"', "colour", '["b"]', 2),
    ("nul\0here", "nul\0kind", None, 1),
    ("naïve ☃ 漢字", "ünï", "[]", None),
    ("50% off_ [x] `y`", "a,b", '["a"]', 2),
    ("", None, None, None),
    ("-- c", "-- k", None, 1),
    (":p0", ":p0", None, 2),
]
#: What somebody has filtered a table's page by.
FILTERS: list[dict[str, Any]] = [
    {"kind": "nul\0kind"},
    {"word__exact": "it's"},
    {"word__contains": '"hi"'},
    {"word__contains": "漢"},
    {"word__glob": "*[[]x*"},
    {"word__like": "50\\%%"},
    {"word__isblank": "1"},
    {"kind__isnull": "1"},
    {"kind__in": '["a,b"]'},
    {"kind": ":p0"},
    {"kind__exact": "-- k"},
    {"tags__arraycontains": "a"},
    {"rowid": "2"},
    {"id__lt": "3", "_sort_desc": "word", "_facet": "kind"},
    {"_search": "it's"},
    {"_search": '"hi'},
    {"_search_word": "naïve"},
    {"_search": "nothing*", "_searchmode": "raw"},
    {"_where": "kind = 'number' -- this"},
    {"_where": "id = 1 or id = 2", "kind": "colour"},
    {"_where": ["id < 3 -- and so on", "0"]},
    {"_where": "id = :p0", "id": "2"},
    {"_through": json.dumps({"table": "uses", "column": "name", "value": "it's"})},
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette serves its pages with it.


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(
        tmp_path,
        "create table words (id integer primary key, word text, kind text, tags text, other integer)",
        'create virtual table words_fts using fts5(word, content="words")',
        "create table uses (name text, word_id integer references words(id))",
        "insert into uses values ('it''s', 3), ('another', 4)",
    )
    file.run_many("insert into words (word, kind, tags, other) values (?, ?, ?, ?)", WORDS)
    file.run("insert into words_fts (words_fts) values ('rebuild')")
    yield file
    file.close()


def request(query: str, actor: Any = ANA) -> Any:
    asked = Request.fake(f"/data/-/llm/enrich/words?{query}")
    asked.scope["actor"] = actor
    return asked


async def test_the_rows_of_the_page_are_those_of_the_job(file: TableFile) -> None:
    async with site(file) as pages:
        for filters in FILTERS:
            query = urlencode(filters, doseq=True)
            page = await pages.get(f"/data/words.json?_shape=objects&_nocount=1&{query}")
            filtered = await read_filters(pages.datasette, request(query_about_rows(query)), "data", "words")
            database = pages.datasette.get_database("data")
            found = await database.execute(f"select id from words where ({filtered.where}\n)")
            assert sorted(row["id"] for row in page.json()["rows"]) == [row[0] for row in found.rows], filters
            assert filtered.words, filters


async def test_a_filtered_job_and_the_command_that_goes_on_with_it(file: TableFile) -> None:
    with fake_model() as fake:
        async with site(file) as pages:
            query = urlencode({"_where": "other = 1", "kind__not": "nul\0kind"})
            table = await pages.get(f"/data/words?{query}&_sort=word")
            form = f"{FORM}?{query}"
            assert f'href="{form.replace("&", "&amp;")}"' in table.text
            path = await pages.run(form, limit="1")
            assert (await pages.ended(path))["written"] == 1
            run = file.run("select id, json_extract(spec, '$.where') from _llm_runs")[0]
        report = await file.enrich("words", ASK["prompt"], column="said", where=run[1])
        assert report.written == 1
    assert sorted(fake.prompts) == ["Say -- c", "Say it's"]


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ({"gone__not": "1"}, "The filter gone__not is about no column of this table"),
        ({"": "1"}, "is about no column"),
        ({"kind__nosuch": "1"}, "There is no filter &#39;nosuch&#39;"),
        ({"_where": "nonsense("}, "is not valid here: incomplete input"),
        ({"_where": "1 /*"}, "is not valid here"),
        ({"_where": "1; drop table words"}, "is not valid here"),
        ({"_through": "{"}, "A filter in the address cannot be read"),
        ({"_search_gone": "x"}, "Cannot search by that column"),
    ],
)
async def test_a_filter_that_does_not_apply_is_told_and_nothing_is_sent(
    file: TableFile, filters: dict[str, str], says: str
) -> None:
    # Datasette's own page shows all rows for some of these.
    with fake_model() as fake:
        async with site(file) as pages:
            form = f"{FORM}?{urlencode(filters)}"
            assert says in (await pages.get(form)).text
            sent = await pages.post(form, {**ASK, "action": "run"})
            assert (sent.status_code, says in sent.text) == (400, True)
    assert fake.prompts == []


async def test_a_condition_of_their_own_takes_the_right_to_give_one(file: TableFile) -> None:
    with fake_model() as fake:
        async with site(file) as pages:
            pages.datasette.config["permissions"]["execute-sql"] = BEN
            for path in (f"{FORM}?_where=1", f"{FORM}?kind=number&_where=1"):
                assert (await pages.get(path)).status_code == 403
                assert (await pages.post(path, {**ASK, "action": "run"})).status_code == 403
    assert fake.prompts == []


async def test_rows_whose_values_a_filter_cannot_read_are_not_counted(file: TableFile) -> None:
    file.run("update words set tags = '[' where id = 2")
    async with site(file) as pages:
        read = text_of(await pages.get(f"{FORM}?tags__arraycontains=b"))
    assert "Rows that cannot be counted" in read


def test_what_a_table_page_shows_beside_its_rows_is_no_filter() -> None:
    query = (
        "kind__exact=a&_sort=b&_facet=c&_facet_size=9&_search=d&_where=e&_size=5&_odd__not=f&_of_a_plugin=g"
    )
    assert query_about_rows(query) == "kind__exact=a&_search=d&_where=e&_odd__not=f&_of_a_plugin=g"
