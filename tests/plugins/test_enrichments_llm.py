"""datasette-enrichments-llm: a job started on datasette-enrichments' page fills its column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from datasette.plugins import pm

from datasette_llm import LLM, get_purposes

from ..fakes import FakeModel, registered
from ..hooks import hooked
from .enriching import Site, register

pytest.importorskip("datasette_enrichments_llm", reason="datasette-enrichments-llm is not installed")

import datasette_enrichments_llm  # not installed everywhere

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = [
    pytest.mark.real_clock,
    # Its form still gives wtforms pairs.
    pytest.mark.filterwarnings("ignore:Passing SelectField choices as tuples:DeprecationWarning"),
]

ROWS = (
    "create table words (id integer primary key, word text)",
    "insert into words (word) values ('one'), ('two'), ('three'), ('four')",
)
PAGE = "/-/enrich/data/words/llm"
FORM = {
    "model": "fake",
    "prompt": "Say {{ word }}",
    "system_prompt": "",
    "media_url": "",
    "output_column": "said",
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette serves its pages with it.


@pytest.fixture(autouse=True)
def _plugins() -> None:
    register(datasette_enrichments_llm)


async def test_the_page_offers_the_models_of_the_purpose(tmp_path: Path) -> None:
    with registered(FakeModel(), FakeModel(model_id="blocked"), FakeModel(model_id="preferred")):
        settings = {
            "purposes": {"enrichments": {"model": "preferred", "blocked_models": ["blocked"]}},
            "models": ["fake", "preferred", "blocked"],
        }
        site = Site(tmp_path, *ROWS, settings=settings)
        page = await site.get(PAGE)
        assert page.status_code == 200
        offered = [line.split('"')[1] for line in page.text.split("<option ")[1:]]
        assert [part for part in offered if part] == ["preferred", "fake"]
        ids = [model.model_id for model in await LLM(site.datasette).models(purpose="enrichments")]
        assert ids == offered


async def test_a_job_fills_its_column(tmp_path: Path) -> None:
    seen: list[Any] = []

    def note(datasette: Any, model_id: str, prompt: str, purpose: str, actor: Any) -> None:
        seen.append((prompt, purpose, actor))

    def actors(datasette: Any, actor_ids: list[str]) -> dict[str, Any]:
        return {actor_id: {"id": actor_id, "name": actor_id.title()} for actor_id in actor_ids}

    hooks = hooked(llm_prompt_context=note, actors_from_ids=actors)
    with registered(FakeModel()), hooks:
        site = Site(tmp_path, *ROWS)
        started = await site.post(PAGE + "?word__not=four", FORM)
        assert started.status_code == 302
        assert started.headers["location"] == "/data/words?_enrichment_job=1"
        job = await site.ended()
        assert (job["status"], job["done_count"], job["error_count"]) == ("finished", 3, 0)
        assert site.run("select word, said from words") == [
            ("one", "Say one"),
            ("two", "Say two"),
            ("three", "Say three"),
            ("four", None),
        ]
        assert seen == [
            (f"Say {word}", "enrichments", {"id": "ana", "name": "Ana"}) for word in ("one", "two", "three")
        ]
        assert "enrichments" in {purpose.name for purpose in get_purposes(site.datasette)}


async def test_rows_whose_prompt_fails_are_errors_of_the_job(tmp_path: Path) -> None:
    async def script(prompt: str) -> AsyncGenerator[str, None]:
        if prompt == "Say two":
            raise ValueError("cannot say that")
        yield prompt

    with registered(FakeModel(script)):
        site = Site(tmp_path, *ROWS)
        await site.post(PAGE, FORM)
        job = await site.ended()
        assert (job["status"], job["done_count"], job["error_count"]) == ("finished", 4, 1)
        assert site.run("select row_pks, error from _enrichment_errors") == [("[2]", "cannot say that")]
        assert site.run("select count(*) from words where said is not null") == [(3,)]


async def test_with_usage_and_limits_beside_it(tmp_path: Path) -> None:
    """All plugins at once: rows filled, usage noted, the budget stops the job's later rows."""
    usage = pytest.importorskip("datasette_llm_usage", reason="datasette-llm-usage is not installed")
    limits = pytest.importorskip("datasette_llm_limits", reason="datasette-llm-limits is not installed")
    import datasette_llm_accountant

    from .bookkeeping import TokenPrice

    for plugin in (usage, limits, datasette_llm_accountant):
        pm.register(plugin)
    cents = int(datasette_llm_accountant.Nanocents.from_cents(1))
    pricing = hooked(register_llm_accountant_pricing=lambda datasette: TokenPrice(cents))
    with registered(FakeModel()), pricing:
        site = Site(
            tmp_path,
            *ROWS,
            datasette_llm_limits={
                "limits": {
                    "ana": {"scope": "actor", "window": "calendar-day", "amount_usd": 0.14},
                }
            },
        )
        with hooked(actors_from_ids=lambda actor_ids: {actor_id: {"id": actor_id} for actor_id in actor_ids}):
            await site.datasette.invoke_startup()
            await site.post(PAGE, FORM)
            job = await site.ended()
        # A prompt reserves ten cents and costs three: the third one does not fit.
        assert (job["status"], job["error_count"]) == ("finished", 2)
        assert site.run("select word from words where said is not null") == [("one",), ("two",)]
        ((error,), _) = site.run("select error from _enrichment_errors")
        assert error.startswith('Limit "ana" exceeded: $0.06 used of $0.14')
        internal = site.datasette.get_internal_database()
        rows = await internal.execute("select purpose, actor_id, input_tokens from llm_usage")
        assert [tuple(row) for row in rows.rows] == [("enrichments", "ana", 2)] * 2


async def test_without_the_permission_there_is_nothing_to_see(tmp_path: Path) -> None:
    with registered(fake := FakeModel()):
        site = Site(tmp_path, *ROWS)
        for actor in (None, {"id": "bob"}):
            assert (await site.get(PAGE, actor)).status_code == 403
            assert (await site.post(PAGE, FORM, actor)).status_code == 403
        assert site.jobs() == 0
        assert fake.prompts == []
