"""Jobs in the browser: who may see and start them, what the form says, and what the pages show."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from datasette.app import Datasette

from datasette_llm.enrich.spec import JobSpec
from datasette_llm.pages.jobs import live, menus, views
from datasette_llm.pages.jobs.chart import POINTS, History, draw
from datasette_llm.pages.jobs.filters import literal, with_literals

from .enrich_tables import TableFile, fake_model
from .job_site import ANA, ASK, BEN, FORM, site, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_clock


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette serves its pages with it.


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(
        tmp_path,
        "create table words (id integer primary key, word text, kind text)",
        "insert into words (word, kind) values ('one', 'number'), ('two', 'number'), ('red', 'colour')",
        "create table secret (id integer primary key, word text)",
    )
    yield file
    file.close()


async def test_a_job_from_the_tables_page_to_its_result(file: TableFile) -> None:
    with fake_model() as fake:
        async with site(file) as pages:
            table = await pages.get("/data/words?kind__exact=number&_sort=word")
            form = FORM + "?kind__exact=number"
            assert f'href="{form}"' in table.text
            assert "2 rows where kind" in text_of(await pages.get(form))
            path = await pages.run(form)
            told = await pages.ended(path)
            assert (told["state"], told["written"], told["table"]) == ("done", 2, "words")
            page = await pages.get(path)
            assert "/data/words?said__notnull=1&amp;_sort=said&amp;_facet=said" in page.text
            assert 'href="/data/words/2"' in page.text
            assert "Say two" in (await pages.get("/data/words?said__notnull=1")).text
            assert path in (await pages.get("/data/words/1")).text
            assert path not in (await pages.get("/data/words/3")).text
            assert path in (await pages.get("/data/-/llm/jobs")).text
            jobs = (await pages.get("/data/-/llm/jobs.json")).json()["jobs"]
            assert [job["state"] for job in jobs] == ["done"]
            assert "/data/-/llm/jobs" in (await pages.get("/data")).text
    assert sorted(fake.prompts) == ["Say one", "Say two"]


async def test_preview_sends_nothing_and_a_trial_writes_nothing(file: TableFile) -> None:
    with fake_model() as fake:
        async with site(file) as pages:
            preview = await pages.post(FORM, {**ASK, "schema": "tone, score int", "action": "preview"})
            read = text_of(preview)
            assert "3 rows would be asked about" in read
            assert "Say red" in read
            assert "tone (text, new), score (integer, new)" in read
            assert fake.prompts == []
            tried = text_of(await pages.post(FORM, {**ASK, "action": "try"}))
            assert "Row 3 Prompt Say red said Say red" in tried
            assert "All of them: 3 rows to fake" in tried
            assert len(fake.prompts) == 3
            assert (await pages.get("/data/-/llm/jobs.json")).json()["jobs"] == []
    assert [name for (name,) in file.run("select name from pragma_table_info('words')")] == [
        "id",
        "word",
        "kind",
    ]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "Say {{ wrd }}", "did you mean &#39;word&#39;?"),
        ("prompt", "", "Write what to ask"),
        ("column", "id", "id"),
        ("schema", "{", "schema"),
        ("model", "none", "is not available"),
        ("options", "temperature", "has no value"),
        ("options", "temprature 1", "did you mean &#39;temperature&#39;"),
        ("limit", "-3", "more than 0"),
        ("max_cost", "1", "No price is known"),
    ],
)
async def test_a_mistake_stands_at_its_field_and_nothing_typed_is_lost(
    file: TableFile, field: str, value: str, says: str
) -> None:
    with fake_model() as fake:
        async with site(file) as pages:
            fields = {**ASK, "system": "Be <b>brief</b>", field: value, "action": "run"}
            answer = await pages.post(FORM, fields)
    assert answer.status_code == 400
    error = re.search(f'id="{field}-error">(.*?)</p>', answer.text, re.DOTALL)
    assert error is not None
    assert says in error[1]
    described = re.search(f'<[^>]* id="{field}" [^>]*>', answer.text)
    assert described is not None
    assert f'aria-describedby="{field}-error' in described[0]
    assert 'aria-invalid="true"' in described[0]
    assert "Be &lt;b&gt;brief&lt;/b&gt;" in answer.text
    assert fake.prompts == []


@pytest.mark.parametrize("address", ["/data/words", "the job's"])
async def test_the_form_is_loaded_as_soon_as_the_way_to_it_is_shown(
    file: TableFile, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(menus, "load_form_soon", begun.append)
    monkeypatch.setattr(views, "load_form_soon", begun.append)
    with fake_model():
        async with site(file) as pages:
            path = await pages.run()
            await pages.ended(path)
            path = path if address == "the job's" else address
            begun.clear()
            assert (await pages.get(path, BEN)).status_code == 200
            assert begun == []
            assert FORM in (await pages.get(path)).text
            assert len(begun) == 1


async def test_who_may_see_and_start_jobs(file: TableFile) -> None:
    secret = "/data/-/llm/enrich/secret"
    file.run("insert into secret (word) values ('hidden')")
    with fake_model():
        async with site(file) as pages:
            assert (await pages.get(FORM, BEN)).status_code == 403
            assert (await pages.post(FORM, {**ASK, "action": "run"}, BEN)).status_code == 403
            assert "/-/llm/enrich/" not in (await pages.get("/data/words", BEN)).text
            path = await pages.run(secret)
            await pages.ended(path)
            for address in (path, path + ".json", path + "/events"):
                assert (await pages.get(address, BEN)).status_code == 403
            assert (await pages.get("/data/-/llm/jobs.json", BEN)).json()["jobs"] == []
            open_one = await pages.run()
            await pages.ended(open_one)
            assert (await pages.get(open_one, BEN)).status_code == 200
            assert (
                "<button"
                not in (await pages.get(open_one, BEN)).text.partition("<main")[2].partition("</main")[0]
            )
            for action in ("pause", "resume", "cancel", "go-on", "retry", "stale"):
                assert (await pages.post(f"{open_one}/{action}", actor=BEN)).status_code == 403
                assert (await pages.get(f"{open_one}/{action}")).status_code == 405
            elsewhere = {"sec-fetch-site": "cross-site", "origin": "https://elsewhere.example"}
            for address in (FORM, f"{open_one}/stale"):
                sent = await pages.post(address, ASK, headers=elsewhere)
                assert sent.status_code == 403


async def test_pause_go_on_and_a_second_job_on_the_column(file: TableFile) -> None:
    asked, answer = anyio.Event(), anyio.Event()

    async def script(prompt: str) -> Any:
        asked.set()
        await answer.wait()
        yield prompt

    with fake_model(script) as fake:
        async with site(file) as pages:
            path = await pages.run()
            await asked.wait()
            assert (await pages.get(path + ".json")).json()["state"] == "running"
            second = await pages.post(FORM, {**ASK, "action": "run"})
            assert "Another job is already filling the column" in text_of(second)
            await pages.post(path + "/pause")
            assert (await pages.get(path + ".json")).json()["state"] == "paused"
            assert "Go on" in text_of(await pages.get(path))
            answer.set()
            await pages.post(path + "/resume")
            assert (await pages.ended(path))["written"] == 3
    assert len(fake.prompts) == 3


async def test_failures_are_named_with_their_rows_and_retried(file: TableFile) -> None:
    works = False

    async def script(prompt: str) -> Any:
        if "two" in prompt and not works:
            raise ValueError("<b>no</b> answer")
        yield f"<i>{prompt}</i>"

    with fake_model(script):
        async with site(file) as pages:
            path = await pages.run()
            told = await pages.ended(path)
            assert [(each["kind"], each["rows"]) for each in told["failures"]] == [("error", [[2]])]
            page = await pages.get(path)
            assert 'Row <a href="/data/words/2"' in page.text
            assert "<b>no</b>" not in page.text
            assert "<i>Say" not in page.text
            works = True
            answer = await pages.post(path + "/retry")
            again = await pages.ended(answer.headers["location"])
            assert (again["written"], again["failed"]) == (1, 0)
            assert "No row is waiting" in text_of(await pages.post(path + "/stale"))
            file.run("update words set word = 'blue' where id = 3")
            answer = await pages.post(path + "/stale")
            assert (await pages.ended(answer.headers["location"]))["written"] == 1
            form = await pages.get(FORM + "?_run=1")
            assert "Say {{ word }}" in form.text
            assert 'value="said"' in form.text


async def test_a_server_that_stops_leaves_a_job_that_goes_on(file: TableFile) -> None:
    asked = anyio.Event()

    async def script(prompt: str) -> Any:
        if "two" in prompt:
            asked.set()
            await anyio.sleep_forever()
        yield prompt

    with fake_model(script):
        async with site(file) as pages:
            path = await pages.run()
            await asked.wait()
            job = live.find(pages.datasette, "data", 1)
            assert job is not None
            job._job.stop(grace_seconds=0)
    assert file.run("select said from words order by id") == [("Say one",), (None,), (None,)]
    with fake_model() as fake:
        async with site(file) as pages:
            assert (await pages.get(path + ".json")).json()["state"] == "stopped"
            # As after a kill.
            file.run("update _llm_runs set ended = null, outcome = null")
            told = (await pages.get(path + ".json")).json()
            assert told["state"] == "interrupted"
            answer = await pages.post(path + "/go-on")
            assert (await pages.ended(answer.headers["location"]))["written"] == 2
    assert sorted(fake.prompts) == ["Say red", "Say two"]


async def test_going_on_with_a_job_that_overwrites_asks_about_no_row_twice(file: TableFile) -> None:
    file.run("alter table words add column said text")
    file.run("update words set said = 'old'")
    with fake_model() as fake:
        async with site(file) as pages:
            path = await pages.run(overwrite="1", limit="1")
            await pages.ended(path)
            file.run("update _llm_runs set ended = null, outcome = null, spec = json_remove(spec, '$.limit')")
            answer = await pages.post(path + "/go-on")
            assert (await pages.ended(answer.headers["location"]))["written"] == 2
    assert sorted(fake.prompts) == ["Say one", "Say red", "Say two"]


async def test_progress_comes_as_events(file: TableFile, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasette_llm.pages.jobs import events

    monkeypatch.setattr(events, "STREAM_SECONDS", 0.2)
    asked, answer = anyio.Event(), anyio.Event()

    async def script(prompt: str) -> Any:
        asked.set()
        await answer.wait()
        yield prompt

    with fake_model(script):
        async with site(file) as pages:
            path = await pages.run()
            await asked.wait()
            stream = (await pages.get(path + "/events")).text
            data = next(line for line in stream.splitlines() if line.startswith("data: "))
            told = json.loads(data.removeprefix("data: "))
            assert told["state"] == "running"
            assert "data-part" in told["html"]
            answer.set()
            await pages.ended(path)
            assert "event: end" in (await pages.get(path + "/events")).text


async def test_those_who_watch_share_what_they_see() -> None:
    made: list[int] = []

    async def make() -> str:
        made.append(1)
        await anyio.lowlevel.checkpoint()
        return f"made {len(made)} times"

    job = live.LiveJob(Datasette(), JobSpec(database="data", table="words", prompt="Say"))
    seen: list[str] = []

    async def watch() -> None:
        seen.append(await job.shown(make))

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(watch)
    assert seen == ["made 1 times"] * 10
    job.pause()
    assert await job.shown(make) == "made 2 times"


def test_parameters_become_literals_but_not_where_they_only_look_like_it() -> None:
    sql = """ "a:p0" = :p0 and ':p0' != x and [:p0] is `:p0` -- :p0\n and y = :p1 and z = :other """
    written = with_literals(sql, {"p0": "it's", "p1": 1.5})
    assert (
        written
        == """ "a:p0" = 'it''s' and ':p0' != x and [:p0] is `:p0` -- :p0\n and y = 1.5 and z = :other """
    )
    assert [literal(value) for value in (None, True, 7, b"\xff", "a\0b")] == [
        "null", "1", "7", "x'ff'", "cast(x'610062' as text)",
    ]  # fmt: skip


def test_a_long_history_stays_short() -> None:
    history = History()
    assert draw(history) is None
    for second in range(1, 5000):
        history.add(float(second), second * 3, second / 100)
    assert len(history.points) <= POINTS
    assert history.rate == pytest.approx(3)
    chart = draw(history)
    assert chart is not None
    assert chart.highest_rate == pytest.approx(3)
    assert chart.costs


async def test_the_servers_state_tells_of_jobs_on_tables_that_one_may_see(file: TableFile) -> None:
    go_on, begun = anyio.Event(), anyio.Event()

    async def wait(prompt: str) -> Any:
        begun.set()
        await go_on.wait()
        yield "said"

    async def state(actor: dict[str, Any]) -> dict[str, Any]:
        return dict((await pages.get("/-/llm.json?live=1", actor)).json())

    with fake_model(wait):
        async with site(file) as pages:
            pages.datasette.config["permissions"]["llm-status"] = {"id": ["ana", "ben"]}
            assert (await state(ANA))["jobs"] == []
            file.run("insert into secret (word) values ('hush')")
            path = await pages.run("/data/-/llm/enrich/secret")
            await begun.wait()
            (job,) = (await state(ANA))["jobs"]
            assert (job["database"], job["table"], job["state"]) == ("data", "secret", "running")
            assert job["path"] == path
            assert f'<a href="{path}">data: secret</a>' in (await pages.get("/-/llm")).text
            told = await state(BEN)
            assert (told["jobs"], told["jobs_not_shown"]) == ([], 1)
            assert "secret" not in json.dumps(told)
            go_on.set()
            await pages.ended(path)
            assert (await state(ANA))["jobs"] == []
