"""What the pages of jobs tell of several at once, of interrupted ones, and of what is out of the ordinary."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm.enrich.errors import EnrichError
from datasette_llm.enrich.job import EnrichJob
from datasette_llm.pages.jobs import counting, events, forms, live, story

from .enrich_tables import TableFile, fake_model
from .job_site import ANA, ASK, BEN, FORM, site, text_of
from .patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_clock

JOBS = "/data/-/llm/jobs"
#: A run's row as a server leaves it that is killed.
KILLED = "update _llm_runs set ended = null, outcome = null, cost = coalesce(cost, 0.5), failures = null"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette serves its pages with it.


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(
        tmp_path,
        "create table words (id integer primary key, word text, kind text)",
        "insert into words (word, kind) values ('one', 'number'), ('two', 'number'), ('red', 'colour')",
    )
    yield file
    file.close()


async def test_jobs_on_several_columns_run_at_once_and_each_is_told_by_itself(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine, what is in flight waits for the event.
    monkeypatch.setattr(live, "GRACE_SECONDS", PATIENCE_SECONDS)
    go_on, both_asked = anyio.Event(), anyio.Event()
    asked: set[str] = set()

    async def wait(prompt: str) -> Any:
        asked.add(prompt.split()[0])
        if asked == {"First", "Second"}:
            both_asked.set()
        await go_on.wait()
        yield prompt

    with fake_model(wait):
        async with site(file, concurrency=2) as pages:
            first = await pages.run(prompt="First {{ word }}", column="first")
            second = await pages.run(prompt="Second {{ word }}", column="second")
            # A job that has asked nothing yet ends as soon as it is told to.
            with anyio.fail_after(PATIENCE_SECONDS):
                await both_asked.wait()
            jobs = (await pages.get(f"{JOBS}.json")).json()["jobs"]
            assert [(job["columns"], job["state"]) for job in jobs] == [
                (["second"], "running"),
                (["first"], "running"),
            ]
            refused = text_of(await pages.post(FORM, {**ASK, "column": "FIRST", "action": "run"}))
            assert "Another job is already filling the column" in refused
            assert len((await pages.get(f"{JOBS}.json")).json()["jobs"]) == 2
            await pages.post(f"{first}/cancel")
            assert (await pages.get(first + ".json")).json()["state"] == "stopping"
            assert "Stopping" in text_of(await pages.get(first))
            go_on.set()
            assert (await pages.ended(first))["written"] < 3
            assert (await pages.ended(second))["written"] == 3
            await pages.post(f"{second}/cancel")  # Too late, which changes nothing.
            assert (await pages.get(second + ".json")).json()["state"] == "done"


async def test_two_jobs_of_a_server_that_was_killed_show_their_cost_and_go_on(file: TableFile) -> None:
    prices = {"fake": {"input": 1_000_000, "output": 0}}
    with fake_model():
        async with site(file, prices=prices) as pages:
            for column in ("first", "second"):
                await pages.ended(await pages.run(column=column, limit="1"))
    file.run(KILLED)
    file.run("update _llm_runs set spec = json_remove(spec, '$.limit'), cost = 2.25")
    with fake_model() as fake:
        async with site(file, prices=prices) as pages:
            states = [job["state"] for job in (await pages.get(f"{JOBS}.json")).json()["jobs"]]
            assert states == ["interrupted", "interrupted"]
            assert text_of(await pages.get(JOBS)).count("Interrupted") == 2
            read = text_of(await pages.get(f"{JOBS}/1"))
            assert "Interrupted: its process ended in the middle of it." in read
            assert "Written 1" in read
            assert "Cost $2.25" in read
            for number in (1, 2):
                answer = await pages.post(f"{JOBS}/{number}/go-on")
                assert (await pages.ended(answer.headers["location"]))["written"] == 2
    assert len(fake.prompts) == 4


async def test_a_job_that_another_process_runs_is_told_as_that(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_model():
        async with site(file) as pages:
            path = await pages.run()
            await pages.ended(path)
            file.run(KILLED)
            live._jobs.pop(pages.datasette)
            monkeypatch.setattr(story, "is_held", lambda *args: True)
            page = await pages.get(path)
    assert "Running in another process" in text_of(page)
    assert "/go-on" not in page.text


async def test_rows_of_a_killed_run_that_failed_are_named_from_their_records(tmp_path: Path) -> None:
    file = TableFile(
        tmp_path,
        "create table words (a text, b text, word text, primary key (a, b))",
        "insert into words values ('x/y', 'z', 'bad'), ('w', '', 'good')",
    )

    async def script(prompt: str) -> Any:
        if "bad" in prompt:
            raise ValueError("<b>" + "no " * 200)
        yield "x" * 500

    with fake_model(script):
        async with site(file) as pages:
            path = await pages.run()
            told = await pages.ended(path)
            assert (told["written"], told["failed"]) == (1, 1)
            assert "x" * story.TEXT_CHARACTERS + "..." in (await pages.get(path)).text
        file.run(KILLED)
        async with site(file) as pages:
            page = await pages.get(path)
            assert '<a href="/data/words/x~2Fy,z">Row x/y, z</a>' in page.text
            assert "&lt;b&gt;no no" in page.text
            file.run("drop table _llm_enrich_errors")
            assert "Row x/y" not in (await pages.get(path)).text
    file.close()


async def test_what_the_figures_of_a_job_say(file: TableFile) -> None:
    told: dict[str, Any] = {
        "state": "running",
        "done": 1234,
        "total": 5000,
        "written": 1200,
        "failed": 4,
        "skipped": 30,
        "running": 7,
        "rows_per_second": 12.34,
        "seconds_left": 0,
        "elapsed": 100.0,
        "input_tokens": 5000,
        "output_tokens": 10,
        "cost": None,
        "retries": 3,
    }
    figures = dict(story.in_words(told))
    assert figures["Rows done"] == "1,234 of 5,000"
    assert (figures["Nothing to ask"], figures["Being asked now"]) == ("30", "7")
    assert (figures["Rows a second"], figures["Time left"]) == ("12.3", "moments")
    assert (figures["Tokens"], figures["Tried again"]) == ("5,000 in, 10 out", "3")
    assert figures["Cost"] == "no price known"
    assert "Cost" not in dict(story.in_words({**told, "state": "interrupted"}))
    assert dict(story.in_words({**told, "total": None}))["Rows done"] == "1,234"


async def test_what_a_job_waits_for_and_why_it_ended(file: TableFile) -> None:
    with fake_model() as fake:
        async with site(file, prices={"fake": {"input": 1_000_000, "output": 0}}) as pages:
            path = await pages.run(column="dear", max_cost="2", system="Be brief", options="temperature 0.5")
            told = await pages.ended(path)
            assert (told["state"], told["written"]) == ("stopped", 1)
            read = text_of(await pages.get(path))
            assert "Stopped early" in read
            assert "System prompt Be brief" in read
            assert "Options temperature 0.5" in read
            job = live.find(pages.datasette, "data", 1)
            assert job is not None
            assert "cost" in str(told["why"])
            form = (await pages.get(f"{FORM}?_run=1")).text
            assert 'name="max_cost" value="2"' in form
            empty = await pages.run(prompt="{{ kind if kind == 'colour' }}", column="some")
            told = await pages.ended(empty)
            assert (told["skipped"], told["written"]) == (2, 1)
            assert "Nothing to ask 2" in text_of(await pages.get(empty))
            job = live.LiveJob(pages.datasette, job.spec)
            job.progress.total, job.progress.waiting = 10, "for the provider"
            told = story._of_live(job)
            assert told["waiting"] == "for the provider"
            job.progress.quota_seconds = 60.0
            assert "the quota is used up until" in str(story._of_live(job)["waiting"])
    assert len(fake.prompts) == 2


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"{JOBS}/999", 404),
        (f"{JOBS}/999.json", 404),
        (f"{JOBS}/999/events", 404),
        (f"{JOBS}/999999999999999", 404),
        (f"{JOBS}/-1", 404),
        (f"{JOBS}/1'", 404),
        (f"{JOBS}", 200),
        ("/nothing/-/llm/jobs", 404),
        (f"{FORM}?_run=1", 404),
        (f"{FORM}?_run=²", 404),
        (f"{FORM}?_run={'9' * 40}", 404),
        ("/data/-/llm/enrich/nothing", 404),
        ("/nothing/-/llm/enrich/words", 404),
        ("/data/-/llm/enrich/_llm_runs", 404),
        ("/data/-/llm/enrich/view", 400),
    ],
)
async def test_addresses_of_nothing(file: TableFile, path: str, status: int) -> None:
    file.run("create view view as select 1 as one")
    async with site(file) as pages:
        answer = await pages.get(path)
        assert answer.status_code == status, text_of(answer)
        if path.startswith(f"{JOBS}/9"):
            assert (await pages.post(f"{JOBS}/999/go-on")).status_code == 404


async def test_a_prompt_of_ten_megabytes_is_answered_in_words(file: TableFile) -> None:
    with fake_model() as fake:
        async with site(file) as pages:
            long = await pages.post(FORM, {**ASK, "prompt": "long " * 2_000_000, "action": "preview"})
            assert long.status_code in (200, 400, 413)
            assert (await pages.get(FORM)).status_code == 200
    assert fake.prompts == []


async def test_what_is_gone_since_a_job_ran(file: TableFile) -> None:
    with fake_model():
        async with site(file) as pages:
            path = await pages.run()
            await pages.ended(path)
            assert path in (await pages.get("/data/words/1")).text
            file.run("alter table words drop column said")
            pages.datasette.config["permissions"]["alter-table"] = BEN
            refused = await pages.post(f"{path}/stale")
            assert refused.status_code == 403
            assert "You may not add columns to this table." in text_of(refused)
            pages.datasette.config["permissions"]["alter-table"] = ANA
            file.run("drop table words")
            page = await pages.get(path)
            assert page.status_code == 200
            assert "See the result" not in page.text
            assert (await pages.get(path + ".json", BEN)).status_code in (200, 403)
            assert (await pages.post(f"{path}/go-on")).status_code in (400, 403)


async def test_a_run_of_the_command_that_attached_files_is_none_for_the_browser(file: TableFile) -> None:
    with fake_model() as fake:
        async with site(file) as pages:
            path = await pages.run(limit="1")
            await pages.ended(path)
            file.run("update _llm_runs set spec = json_set(spec, '$.attachments', json('[\"{{ word }}\"]'))")
            file.run(KILLED)
            live._jobs.pop(pages.datasette)
            for answer in (await pages.post(f"{path}/go-on"), await pages.get(f"{FORM}?_run=1")):
                assert answer.status_code == 400
                assert "This run attached files to its prompts" in text_of(answer)
    assert len(fake.prompts) == 1


async def test_going_on_with_a_limited_job_asks_about_the_rest_of_it(file: TableFile) -> None:
    with fake_model() as fake:
        async with site(file) as pages:
            path = await pages.run(limit="1")
            await pages.ended(path)
            file.run(KILLED)
            file.run("update _llm_runs set spec = json_set(spec, '$.limit', 2)")
            live._jobs.pop(pages.datasette)
            answer = await pages.post(f"{path}/go-on")
            assert (await pages.ended(answer.headers["location"]))["written"] == 1
            read = text_of(await pages.get(answer.headers["location"]))
            assert "At most 1 row " in read
            file.run("update _llm_runs set spec = json_set(spec, '$.retry_failed', 1)")
            file.run("update _llm_runs set spec = json_set(spec, '$.schema', 'tone, score int')")
            read = text_of(await pages.get(path))
            assert "Only rows that failed before" in read
            assert "Schema tone, score int" in read
    assert len(fake.prompts) == 2


async def test_how_many_rows_there_are_is_told_at_once(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site(file) as pages:
        monkeypatch.setattr(counting, "BOUND", 2)
        assert "More than 2 rows" in text_of(await pages.get(FORM))
        assert "1 row where" in text_of(await pages.get(f"{FORM}?kind=colour"))
        monkeypatch.setattr(counting, "MILLISECONDS", 1)
        slow = "select count(*) from json_each('[1,2,3,4,5,6,7,8,9]') a, json_each(a.json) b, " + ", ".join(
            f"json_each(a.json) c{number}" for number in range(6)
        )
        assert "Rows that take long to count" in text_of(await pages.get(f"{FORM}?_where=({slow}) > 0"))


async def test_what_happens_while_a_form_is_sent(file: TableFile, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(prompt: str) -> Any:
        await anyio.sleep_forever()
        yield ""

    async def fail(job: Any) -> Any:
        raise EnrichError("the disk is full")

    async def break_off(job: Any) -> Any:
        raise RuntimeError("of a plugin")

    with fake_model(never):
        async with site(file) as pages:
            monkeypatch.setattr(forms, "TRY_SECONDS", 0.05)
            tried = await pages.post(FORM, {**ASK, "action": "try"})
            assert "No answer to the rows tried came within" in text_of(tried)
            unknown = await pages.post(FORM, {**ASK, "action": "nothing"})
            assert unknown.status_code == 200
            for function, says in ((fail, "the disk is full"), (break_off, "RuntimeError: of a plugin")):
                monkeypatch.setattr(EnrichJob, "run", function)
                ran = await pages.post(FORM, {**ASK, "action": "run"})
                assert ran.status_code == 400
                assert says in text_of(ran)


async def test_fields_of_numbers_and_models_that_may_not_be_used(file: TableFile) -> None:
    file.run("update words set word = '' where id > 1")
    with fake_model() as fake:
        async with site(file) as pages:
            for field, value in (
                ("limit", "many"),
                ("limit", "9" * 5000),
                ("max_cost", "nan"),
                ("limit", "0"),
            ):
                answer = await pages.post(FORM, {**ASK, field: value, "action": "run"})
                assert "Write a number that is more than 0" in text_of(answer)
            pages.datasette.config["permissions"]["alter-table"] = BEN
            answer = await pages.post(FORM, {**ASK, "action": "run"})
            assert "You may not add the column" in text_of(answer)
    assert fake.prompts == []


async def test_a_stream_ends_with_its_job_or_with_whoever_reads_it(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Writer:
        async def write(self, text: str) -> None:
            told.append(text)
            first.set()

    class Gone:
        async def receive(self) -> dict[str, str]:
            return {"type": "http.disconnect"}

    go_on, asked, first = anyio.Event(), anyio.Event(), anyio.Event()

    async def wait(prompt: str) -> Any:
        asked.set()
        await go_on.wait()
        yield prompt

    with fake_model(wait):
        async with site(file) as pages:
            await pages.run()
            job = live.find(pages.datasette, "data", 1)
            assert job is not None
            await asked.wait()

            async def make() -> str:
                return "seen"

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(events._tell, job, make, Writer())
                await first.wait()
                go_on.set()
            assert told[0] == "data: seen\n\n"
            assert told[-1].startswith("event: end")
            scope = anyio.CancelScope()
            await events._until_gone(Gone(), scope)
            assert scope.cancel_called


async def test_what_a_row_has_of_models_only_where_something_is_on_record(file: TableFile) -> None:
    file.run("create view view as select 1 as id")
    with fake_model():
        async with site(file) as pages:
            assert "Values that language models gave" not in (await pages.get("/data/words/1")).text
            await pages.ended(await pages.run(column="said"))
            file.run("create table other (id integer primary key)")
            file.run("insert into other values (1)")
            assert "Values that language models gave" in (await pages.get("/data/words/1")).text
            assert "Values that language models gave" not in (await pages.get("/data/other/1")).text
            assert json.loads((await pages.get("/data/words/1.json")).text)["ok"]
            assert JOBS in (await pages.get("/data")).text


def _not_ended(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run | {"ended": None, "outcome": None} for run in runs]


async def test_a_job_that_ends_while_its_record_is_read_is_not_called_interrupted(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_model():
        async with site(file) as pages:
            await pages.ended(await pages.run(prompt="{{ word }}", column="answer"))
            as_read = story._find

            def before_it_ended(*args: Any, **which: Any) -> list[dict[str, Any]]:
                monkeypatch.setattr(story, "_find", as_read)
                return _not_ended(as_read(*args, **which))

            for path in (f"{JOBS}/1.json", f"{JOBS}.json"):
                monkeypatch.setattr(story, "_find", before_it_ended)
                told = (await pages.get(path)).json()
                assert [job["state"] for job in told.get("jobs", [told])] == ["done"]


async def test_a_job_that_ends_just_after_its_record_was_read_is_still_stopping(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_model():
        async with site(file) as pages:
            await pages.ended(await pages.run(prompt="{{ word }}", column="answer"))
            as_read = story._find

            def before_it_ended(*args: Any, **which: Any) -> list[dict[str, Any]]:
                return _not_ended(as_read(*args, **which))

            monkeypatch.setattr(story, "_find", before_it_ended)
            monkeypatch.setattr(story, "is_held", lambda *args: True)
            for path in (f"{JOBS}/1.json", f"{JOBS}.json"):
                told = (await pages.get(path)).json()
                assert [job["state"] for job in told.get("jobs", [told])] == ["stopping"]
