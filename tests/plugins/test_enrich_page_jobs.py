"""Jobs of bulk enrichment that datasette-enrichments runs: batches, failures, pausing, resuming, restarts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from datasette.plugins import pm

from datasette_llm.enrich import EnrichJob
from datasette_llm.enrich.writing.lock import only_job

from ..fakes import FakeModel, registered
from ..hooks import hooked
from ..patience import PATIENCE_SECONDS
from .enriching import Site, register

pytest.importorskip("datasette_enrichments", reason="datasette-enrichments is not installed")

import datasette_enrichments

from datasette_llm.pages.enrichments import enrichment, runs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

pytestmark = pytest.mark.real_clock

TABLE = "create table words (id integer primary key, word text, said text)"
PAGE = "/-/enrich/data/words/prompt-rows"
JOB = "/-/enrich/data/-/jobs/1"
FORM = {"model": "fake", "prompt": "Say {{ word }}", "column": "said"}
TWO_AT_A_TIME = {"concurrency": 2}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette serves its pages with it.


@pytest.fixture(autouse=True)
def _plugins() -> None:
    register()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrichment.PromptEnrichment, "batch_size", 10)
    monkeypatch.setattr(enrichment, "STATUS_SECONDS", 0.0)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Return a function that waits until a batch has noticed that it is to stop."""
    stops: list[None] = []
    plain = EnrichJob.stop

    def stop(self: EnrichJob, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        stops.append(None)

    monkeypatch.setattr(EnrichJob, "stop", stop)

    async def wait() -> None:
        with anyio.fail_after(PATIENCE_SECONDS):
            while not stops:  # noqa: ASYNC110  # there is nothing else to ask
                await anyio.sleep(0.01)

    return wait


class Gate:
    """A script for a model: answers so many at once, and the others when it is opened.

    ``reached`` is set when as many wait for that as are sent at a time.
    """

    def __init__(self, answers: int, at_a_time: int = 2) -> None:
        self.answers = answers
        self.at_a_time = at_a_time
        self.reached = anyio.Event()
        self.opened = anyio.Event()

    async def __call__(self, prompt: str) -> AsyncGenerator[str, None]:
        self.answers -= 1
        if self.answers < 0:
            if self.answers <= -self.at_a_time:
                self.reached.set()
            await self.opened.wait()
        yield prompt.upper()


def words(count: int) -> list[str]:
    values = ", ".join(f"('w{number}')" for number in range(1, count + 1))
    return [TABLE, f"insert into words (word) values {values}"]


def once_each(model: FakeModel, count: int) -> bool:
    return Counter(model.prompts) == Counter(f"Say w{number}" for number in range(1, count + 1))


async def test_each_batch_is_a_group_and_the_actor_is_known_everywhere(
    tmp_path: Path, small_batches: None
) -> None:
    groups: list[Any] = []
    actors: list[Any] = []

    def wrap(actor: Any, purpose: str, model_id: str) -> None:
        actors.append((purpose, actor))

    def known(actor_ids: list[str]) -> dict[str, Any]:
        return {actor_id: {"id": actor_id, "name": "Ana"} for actor_id in actor_ids}

    hooks = hooked(
        llm_prompt_context=wrap, llm_group_exit=lambda group: groups.append(group), actors_from_ids=known
    )
    with registered(model := FakeModel()):
        with hooks:
            site = Site(tmp_path, *words(25))
            started = await site.post(PAGE, FORM)
            assert started.headers["location"] == "/data/words?_enrichment_job=1"
            job = await site.ended()
        assert (job["status"], job["done_count"], job["error_count"]) == ("finished", 25, 0)
        assert site.run("select count(*) from words where said = 'Say ' || word") == [(25,)]
        assert once_each(model, 25)
    assert [len(group._responses) for group in groups] == [10, 10, 5]
    assert actors == [("enrichments", {"id": "ana", "name": "Ana"})] * 25
    assert {group.actor["name"] for group in groups} == {"Ana"}


async def test_an_actor_nobody_knows_any_more_is_their_id(tmp_path: Path) -> None:
    seen: list[Any] = []
    hooks = hooked(llm_prompt_context=lambda actor: seen.append(actor), actors_from_ids=lambda actor_ids: {})
    with registered(FakeModel()), hooks:
        site = Site(tmp_path, *words(1))
        await site.post(PAGE, FORM)
        await site.ended()
    assert seen == [{"id": "ana"}]


async def test_where_everybody_may_there_is_no_actor(tmp_path: Path) -> None:
    seen: list[Any] = []
    everybody = {"enrichments": True, "update-row": True, "alter-table": True}
    with registered(FakeModel()), hooked(llm_prompt_context=lambda actor: seen.append(actor)):
        site = Site(tmp_path, *words(1), permissions=everybody)
        await site.post(PAGE, FORM, actor=None)
        assert (await site.ended())["actor_id"] is None
    assert seen == [None]


async def test_a_batch_that_other_code_runs_by_itself(tmp_path: Path) -> None:
    with registered(FakeModel()):
        site = Site(tmp_path, *words(3))
        await site.post(PAGE + "?id=1", FORM)
        await site.ended()
        site.run("update _enrichment_jobs set status = 'running'")
        done = await enrichment.PromptEnrichment().enrich_batch(
            site.datasette,
            site.datasette.get_database("data"),
            "words",
            [{"id": 1}, {"id": 3}],
            ["id"],
            site.job(1)["config"],
            1,
        )
        assert done == 2
        assert site.run("select id from words where said is not null") == [(1,), (3,)]


async def test_only_the_selected_rows_and_only_those_without_a_value(tmp_path: Path) -> None:
    with registered(model := FakeModel()):
        site = Site(tmp_path, *words(5))
        site.run("update words set said = 'already' where id = 2")
        await site.post(PAGE + "?id__lt=4", FORM)
        assert (await site.ended())["done_count"] == 3
        assert sorted(model.prompts) == ["Say w1", "Say w3"]
        await site.post(PAGE + "?id__lt=4", {**FORM, "overwrite": "y"})
        await site.ended(2)
        assert len(model.prompts) == 5
    assert [row[0] for row in site.run("select said from words")] == [
        "Say w1",
        "Say w2",
        "Say w3",
        None,
        None,
    ]


async def test_a_schema_gives_a_typed_column_per_property(tmp_path: Path) -> None:
    async def script(prompt: str) -> AsyncGenerator[str, None]:
        yield '{"letters": 2, "kind": "noun"}' if prompt != "Say w2" else '{"letters": "two", "kind": "?"}'

    with registered(FakeModel(script)):
        site = Site(tmp_path, *words(3))
        await site.post(PAGE, {**FORM, "column": "", "schema": "letters int, kind: part of speech"})
        job = await site.ended()
    assert (job["status"], job["error_count"]) == ("finished", 1)
    assert site.run("select letters, kind from words") == [(2, "noun"), (None, None), (2, "noun")]
    types = site.run("select name, type from pragma_table_info('words') where cid > 2")
    assert types == [("letters", "INTEGER"), ("kind", "TEXT")]
    ((error,),) = site.run("select error from _enrichment_errors")
    assert error.startswith("the answer does not fit the schema: letters")


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("words (word text, said text)", "(word) values ('a'), ('b'), ('c')"),
        ("words (word text primary key, said text)", "(word) values ('a/b'), ('b,c'), ('ü~')"),
        ("words (word text primary key, said text) without rowid", "(word) values ('a'), ('b'), ('c')"),
        ("words (word text primary key, said text)", "(word) values ('a'), (null), (null)"),
        ("words (x, word, said, primary key (word, x))", "(x, word) values (1, 'a'), (2, 'a'), (1, 'b')"),
        (
            "words (k blob primary key, word, said)",
            "(k, word) values (x'00ff', 'a'), (x'01', 'b'), (2.5, 'c')",
        ),
        ('words ("row id" integer primary key, word, said)', "(word) values ('a'), ('b'), ('c')"),
        ("words (rowid, word, said)", "(rowid, word) values ('x', 'a'), ('y', 'b'), ('z', 'c')"),
    ],
)
async def test_keys_of_every_kind(table: str, rows: str, tmp_path: Path) -> None:
    with registered(FakeModel()):
        site = Site(tmp_path, f"create table {table}", f"insert into words {rows}")
        prompt = "{{ word if word is not none else 'nothing' }}"
        await site.post(PAGE, {**FORM, "prompt": prompt})
        job = await site.ended()
    assert (job["status"], job["error_count"]) == ("finished", 0)
    assert site.run("select count(*) from words where said = coalesce(word, 'nothing')") == [(3,)]


async def test_datasette_is_asked_for_the_keys_only(tmp_path: Path) -> None:
    """The columns of a page may be large, and the batch reads those that its prompt uses."""
    with registered(FakeModel()):
        site = Site(tmp_path, *words(2))
        await site.post(PAGE + "?id__gt=0", FORM)
        job = await site.ended()
        assert job["filter_querystring"] == "id__gt=0&_col=id"
        await site.post(PAGE + "?_sort_desc=word", FORM)
        assert (await site.ended(2))["filter_querystring"] == "_sort_desc=word"


class TestFailures:
    async def test_are_recorded_here_and_there(self, tmp_path: Path) -> None:
        async def script(prompt: str) -> AsyncGenerator[str, None]:
            if prompt in ("Say w2", "Say w4"):
                raise ValueError("cannot say that")
            yield prompt

        with registered(FakeModel(script)):
            site = Site(tmp_path, *words(5))
            await site.post(PAGE, FORM)
            job = await site.ended()
            assert (job["status"], job["done_count"], job["error_count"]) == ("finished", 5, 2)
            assert site.run("select row_pks, error from _enrichment_errors") == [
                ("[2, 4]", "ValueError: cannot say that")
            ]
            errors = site.run('select "table", pk, "column", error from _llm_enrich_errors order by pk')
            assert errors == [("words", pk, "said", "ValueError: cannot say that") for pk in (2, 4)]
            progress = await site.get("/-/enrichment-jobs/data/1")
            counts = Counter[str]()
            for section in progress.json()["sections"]:
                counts[section["type"]] += section["count"]
            assert counts == {"success": 3, "error": 2}

    async def test_a_row_whose_prompt_is_empty_is_skipped_and_through(self, tmp_path: Path) -> None:
        with registered(FakeModel()):
            site = Site(tmp_path, *words(2), "update words set word = '' where id = 1")
            await site.post(PAGE, {**FORM, "prompt": "{{ word }}"})
            job = await site.ended()
        assert (job["status"], job["done_count"], job["error_count"]) == ("finished", 2, 0)
        assert site.run("select error from _enrichment_errors") == []

    async def test_when_every_prompt_fails_the_job_pauses_and_resumes(self, tmp_path: Path) -> None:
        broken = True

        async def script(prompt: str) -> AsyncGenerator[str, None]:
            if broken:
                raise PermissionError("the key is wrong")
            yield prompt

        with registered(model := FakeModel(script)):
            site = Site(tmp_path, *words(300), settings=TWO_AT_A_TIME)
            await site.post(PAGE, FORM)
            assert (await site.ended())["status"] == "paused"
            assert enrichment.HOPELESS_FAILURES <= len(model.prompts) <= 100
            page = await site.get(JOB)
            assert "one prompt after the other failed: PermissionError: the key is wrong" in page.text
            assert _progress(site) == 0
            broken = False
            await site.post(JOB + "/resume")
            job = await site.ended()
        assert (job["status"], job["done_count"], job["error_count"]) == ("finished", 300, 0)
        assert site.run("select count(*) from words where said is not null") == [(300,)]

    async def test_a_refused_key_pauses_the_job_at_once(self, tmp_path: Path) -> None:
        class UnauthorizedError(Exception):
            status_code = 401

        refused = True

        async def script(prompt: str) -> AsyncGenerator[str, None]:
            if refused:
                raise UnauthorizedError("incorrect API key")
            yield prompt

        with registered(model := FakeModel(script)):
            site = Site(tmp_path, *words(50), settings=TWO_AT_A_TIME)
            await site.post(PAGE, FORM)
            assert (await site.ended())["status"] == "paused"
            assert "the API key is refused: 401 incorrect API key" in (await site.get(JOB)).text
            assert len(model.prompts) <= 2
            refused = False
            await site.post(JOB + "/resume")
            job = await site.ended()
        assert (job["status"], job["error_count"], _written(site)) == ("finished", 0, 50)

    async def test_who_resumes_all_the_same_gets_past_a_batch_that_only_fails(self, tmp_path: Path) -> None:
        async def script(prompt: str) -> AsyncGenerator[str, None]:
            if int(prompt.removeprefix("Say w")) <= 100:
                raise ValueError("too long")
            yield prompt

        with registered(FakeModel(script)):
            site = Site(tmp_path, *words(150), settings=TWO_AT_A_TIME)
            await site.post(PAGE, FORM)
            assert (await site.ended())["status"] == "paused"
            await site.post(JOB + "/resume")
            job = await site.ended()
        assert (job["status"], job["done_count"], job["error_count"]) == ("finished", 150, 100)
        assert _written(site) == 50

    async def test_a_model_that_is_taken_away_pauses_the_job(
        self, tmp_path: Path, small_batches: None
    ) -> None:
        allowed = True

        def only_while_allowed(models: Any) -> Any:
            return models if allowed else []

        async def script(prompt: str) -> AsyncGenerator[str, None]:
            nonlocal allowed
            allowed = prompt != "Say w10"
            yield prompt

        settings = {"concurrency": 1}
        with registered(FakeModel(script)), hooked(llm_filter_models=only_while_allowed):
            site = Site(tmp_path, *words(20), settings=settings)
            await site.post(PAGE, FORM)
            assert (await site.ended())["status"] == "paused"
            assert site.run("select count(*) from words where said is not null") == [(10,)]
            allowed = True
            await site.post(JOB + "/resume")
            job = await site.ended()
        assert (job["status"], job["done_count"]) == ("finished", 20)

    async def test_a_column_that_another_job_is_filling_pauses_the_job(self, tmp_path: Path) -> None:
        with registered(model := FakeModel()):
            site = Site(tmp_path, *words(2))
            with only_job(site.datasette.get_database("data"), "words", ["said"]):
                await site.post(PAGE, FORM)
                assert (await site.ended())["status"] == "paused"
            assert "Another job is already filling the column" in (await site.get(JOB)).text
            assert model.prompts == []
            await site.post(JOB + "/resume")
            assert (await site.ended())["status"] == "finished"

    async def test_a_column_that_is_gone_cancels_the_job(self, tmp_path: Path, small_batches: None) -> None:
        with registered(FakeModel(gate := Gate(10, at_a_time=1))):
            site = Site(tmp_path, *words(20), settings={"concurrency": 1})
            await site.post(PAGE, FORM)
            await gate.reached.wait()
            site.run("alter table words rename column word to term")
            gate.opened.set()
            assert (await site.ended())["status"] == "paused"
            assert "cannot be written: no such column" in (await site.get(JOB)).text
            await site.post(JOB + "/resume")
            job = await site.ended()
        assert job["status"] == "cancelled"
        assert "'word', which is no column" in job["cancel_reason"]


@pytest.mark.usefixtures("small_batches")
class TestPausing:
    @pytest.mark.parametrize("overwrite", [False, True])
    async def test_in_the_middle_of_a_batch_and_on(
        self, overwrite: bool, tmp_path: Path, stopped: Callable[[], Any]
    ) -> None:
        with registered(model := FakeModel(gate := Gate(13))):
            site = Site(tmp_path, *words(30), settings=TWO_AT_A_TIME)
            await site.post(PAGE, {**FORM, "overwrite": "y"} if overwrite else FORM)
            await gate.reached.wait()
            assert (await site.post(JOB + "/pause")).status_code == 302
            await stopped()
            gate.opened.set()
            job = await site.until(lambda job: _written(site) == 15)
            assert job["status"] == "paused"
            assert len(model.prompts) == 15  # What was in flight is paid for, so it is completed.
            await site.post(JOB + "/resume")
            job = await site.ended()
            assert (job["status"], job["done_count"], job["error_count"]) == ("finished", 30, 0)
            assert site.run("select count(*) from words where said = upper('Say ' || word)") == [(30,)]
            assert once_each(model, 30)
            assert _progress(site) == 30

    async def test_resumed_before_the_batch_has_stopped(self, tmp_path: Path) -> None:
        """Two loops are about the same batch then; each row is asked about once all the same."""
        with registered(model := FakeModel(gate := Gate(13))):
            site = Site(tmp_path, *words(30), settings=TWO_AT_A_TIME)
            await site.post(PAGE, {**FORM, "overwrite": "y"})
            await gate.reached.wait()
            for _ in range(3):
                await site.post(JOB + "/pause")
                await site.post(JOB + "/resume")
            gate.opened.set()
            job = await site.ended()
            assert (job["status"], job["done_count"]) == ("finished", 30)
            assert once_each(model, 30)
            assert _progress(site) == 30

    @pytest.mark.parametrize("count", [10, 30])
    async def test_resumed_while_the_end_of_a_batch_is_being_noted(
        self, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever begins then must not begin with the batch that is just done: it would count twice."""
        batch_done = anyio.Event()
        go_on = anyio.Event()
        plain = datasette_enrichments.record_progress

        async def hesitant(*args: Any) -> None:
            is_of_batch = args[2] > 0
            if is_of_batch and not go_on.is_set():
                batch_done.set()
                await go_on.wait()
            await plain(*args)

        monkeypatch.setattr(enrichment, "STATUS_SECONDS", 60.0)
        monkeypatch.setattr(datasette_enrichments, "record_progress", hesitant)
        with registered(model := FakeModel()):
            site = Site(tmp_path, *words(count), settings=TWO_AT_A_TIME)
            await site.post(PAGE, FORM)
            await batch_done.wait()
            assert (await site.post(JOB + "/pause")).status_code == 302
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(site.post, JOB + "/resume")
                await site.until(lambda job: job["status"] == "running")
                await anyio.wait_all_tasks_blocked()
                go_on.set()
            job = await site.ended()
            assert (job["status"], job["done_count"]) == ("finished", count)
            assert once_each(model, count)
            assert _progress(site) == count

    async def test_resuming_what_was_finished_while_it_was_paused_does_nothing(self, tmp_path: Path) -> None:
        with registered(model := FakeModel()):
            site = Site(tmp_path, *words(5), settings=TWO_AT_A_TIME)
            await site.post(PAGE, FORM)
            await site.ended()
            site.run("update _enrichment_jobs set status = 'paused'")
            assert (await site.post(JOB + "/resume")).status_code == 302
            job = await site.ended()
        assert (job["status"], job["done_count"], len(model.prompts)) == ("finished", 5, 5)

    async def test_cancelling_gives_prompts_in_flight_a_moment(
        self, tmp_path: Path, stopped: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(enrichment, "CANCEL_GRACE_SECONDS", 0.0)
        with registered(model := FakeModel(gate := Gate(13))):
            site = Site(tmp_path, *words(30), settings=TWO_AT_A_TIME)
            await site.post(PAGE, FORM)
            await gate.reached.wait()
            assert (await site.post(JOB + "/cancel")).status_code == 302
            await stopped()
            job = await site.until(lambda job: model.counts["running"] == 0)
            assert job["status"] == "cancelled"
            assert job["cancel_reason"] == "by ana"
            await site.until(lambda job: _written(site) == 13)
            assert (await site.post(JOB + "/resume")).status_code == 400
            assert model.counts["opened"] == model.counts["closed"] == 15

    async def test_cancelled_in_its_last_batch_is_not_finished(
        self, tmp_path: Path, stopped: Callable[[], Any]
    ) -> None:
        with registered(FakeModel(gate := Gate(3))):
            site = Site(tmp_path, *words(8), settings=TWO_AT_A_TIME)
            await site.post(PAGE, FORM)
            await gate.reached.wait()
            await site.post(JOB + "/cancel")
            await stopped()
            gate.opened.set()
            job = await site.until(lambda job: _written(site) == 5)
            assert job["status"] == "cancelled"

    async def test_a_server_that_comes_back_goes_on_where_it_was(self, tmp_path: Path) -> None:
        with registered(model := FakeModel()):
            site = Site(tmp_path, *words(30), settings=TWO_AT_A_TIME)
            await site.post(PAGE + "?id__lte=12", FORM)
            await site.ended()
            # As a process that was killed in the middle of its second batch leaves it.
            site.run("update _enrichment_jobs set status = 'running', next_cursor = '10', done_count = 10")
            site.run("update _enrichment_jobs set filter_querystring = '_col=id', row_count = 30")
            site.run("update _enrichment_jobs set finished_at = null")
            again = Site(tmp_path, settings=TWO_AT_A_TIME)
            await again.get("/data/words")
            job = await again.ended()
            assert (job["status"], job["done_count"]) == ("finished", 30)
            assert once_each(model, 30)


async def test_a_server_that_stops_writes_what_was_answered_and_goes_on_later(
    tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "END_GRACE_SECONDS", 0.0)

    with registered(model := FakeModel(gate := Gate(13)), FakeModel(model_id="other")):
        site = Site(tmp_path, *words(30), settings=TWO_AT_A_TIME)
        if not hasattr(site.datasette, "invoke_shutdown"):
            pytest.skip("this Datasette tells nobody that it stops")
        await site.post(PAGE, FORM)
        await gate.reached.wait()
        await site.post(PAGE + "?id=1", {**FORM, "model": "other", "column": "other"})
        await site.ended(2)
        await site.datasette.invoke_shutdown()
        assert model.counts["opened"] == model.counts["closed"] == 15
        assert _written(site) == 13
        assert site.job(1)["status"] == "running"
        gate.opened.set()
        again = Site(tmp_path, settings=TWO_AT_A_TIME)
        await again.get("/data/words")
        job = await again.ended()
        assert (job["status"], job["done_count"]) == ("finished", 30)
        assert Counter(Counter(model.prompts).values()) == {1: 28, 2: 2}  # Twice: those that were in flight.


async def test_a_budget_is_reserved_once_a_batch_and_settled(tmp_path: Path, small_batches: None) -> None:
    accountant = pytest.importorskip("datasette_llm_accountant", reason="not installed")
    from .bookkeeping import Books, TokenPrice

    pm.register(accountant)
    books = Books()
    hooks = hooked(
        register_llm_accountants=lambda: books, register_llm_accountant_pricing=lambda: TokenPrice()
    )
    with registered(FakeModel()), hooks:
        site = Site(tmp_path, *words(25))
        await site.post(PAGE, FORM)
        await site.ended()
    assert books.about == [("fake", "enrichments", "ana")] * 3
    assert books.settled == [30, 30, 15]
    assert books.balanced


async def test_a_budget_that_is_spent_pauses_the_job(tmp_path: Path) -> None:
    """Answers beyond a batch's reservation are refused after they were paid for: not many of them."""
    accountant = pytest.importorskip("datasette_llm_accountant", reason="not installed")
    from .bookkeeping import Books, TokenPrice

    pm.register(accountant)
    books = Books()
    hooks = hooked(
        register_llm_accountants=lambda: books, register_llm_accountant_pricing=lambda: TokenPrice()
    )
    with registered(FakeModel()), hooks:
        enough_for_ten = {"default_reservation_nanocents": 30}
        site = Site(
            tmp_path,
            *words(100),
            settings=TWO_AT_A_TIME,
            datasette_llm_accountant=enough_for_ten,
        )
        await site.post(PAGE, FORM)
        assert (await site.ended())["status"] == "paused"
        assert "one prompt after the other failed: ReservationExceededError" in (await site.get(JOB)).text
    assert books.balanced
    assert _written(site) == 10


def _written(site: Site) -> int:
    return int(site.run("select count(*) from words where said is not null")[0][0])


def _progress(site: Site) -> int:
    return int(site.run("select sum(success_count + error_count) from _enrichment_progress")[0][0])
