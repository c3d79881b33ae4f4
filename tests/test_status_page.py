"""The server's state at /-/llm: who may see it, what it shows, and its test prompt."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from datasette.app import Datasette
from datasette.database import Database

from datasette_llm import LLM, Purpose
from datasette_llm.pace.policy import PromptSettings
from datasette_llm.pace.registry import get_throttle
from datasette_llm.pages.status import live
from datasette_llm.pages.status.live import MOST, read_live

from .fakes import FakeModel, registered
from .hooks import hooked, llm_models
from .remote_workers import fake_workers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

pytestmark = [pytest.mark.real_clock, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

ROOT = {"id": "root"}
KEY = "sk-live-0123456789abcdef"


class Keyed(FakeModel):
    needs_key = "my-provider"
    key_env_var = "MY_PROVIDER_KEY"


def site(**settings: Any) -> Datasette:
    """Return a Datasette whose root may see everything."""
    datasette = Datasette(config={"plugins": {"datasette-llm": settings}})
    datasette.root_enabled = True
    return datasette


async def get(datasette: Datasette, path: str, actor: dict[str, Any] | None = ROOT) -> Any:
    cookies = {"ds_actor": datasette.client.actor_cookie(actor)} if actor else {}
    return await datasette.client.get(path, cookies=cookies)


async def post(
    datasette: Datasette, data: dict[str, str], actor: dict[str, Any] | None = ROOT, **headers: str
) -> Any:
    """Send the form, as a browser does that has opened the page before."""
    page = await get(datasette, "/-/llm", actor)
    token = re.search(r'name="csrftoken" value="([^"]+)"', page.text)
    cookies = {"ds_actor": datasette.client.actor_cookie(actor)} if actor else {}
    cookies |= dict(page.cookies)
    data = {**data, "csrftoken": token[1]} if token else data
    return await datasette.client.post("/-/llm/test", data=data, headers=headers, cookies=cookies)


async def read(datasette: Datasette, query: str = "") -> dict[str, Any]:
    response = await get(datasette, f"/-/llm.json{query}")
    assert response.status_code == 200
    return dict(response.json())


@pytest.fixture(autouse=True)
def _never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "KEPT_SECONDS", 0.0)


@pytest.fixture
def _fake() -> Iterator[None]:
    with registered(FakeModel()):
        yield


@pytest.mark.parametrize("path", ["/-/llm", "/-/llm.json", "/-/llm.json?live=1", "/-/llm/test"])
async def test_it_takes_the_permission(path: str) -> None:
    datasette = site()
    for actor in (None, {"id": "somebody"}):
        assert (await get(datasette, path, actor)).status_code == 403
        assert (await post(datasette, {}, actor)).status_code == 403
    assert (await get(datasette, path)).status_code == (405 if path.endswith("test") else 200)


async def test_the_permission_can_be_given() -> None:
    datasette = Datasette(config={"permissions": {"llm-status": {"id": "ana"}}})
    assert (await get(datasette, "/-/llm", {"id": "ana"})).status_code == 200
    assert (await get(datasette, "/-/llm", {"id": "bob"})).status_code == 403
    assert 'href="/-/llm"' in (await get(datasette, "/", {"id": "ana"})).text
    assert 'href="/-/llm"' not in (await get(datasette, "/", {"id": "bob"})).text
    assert 'href="/-/llm"' not in (await get(datasette, "/", None)).text


async def test_what_runs_and_what_the_last_hour_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PROVIDER_KEY", KEY)
    go_on = anyio.Event()
    begun = anyio.Event()

    async def script(prompt: str) -> AsyncGenerator[Any, None]:
        if prompt == "wait":
            begun.set()
            await go_on.wait()
        yield "answer"

    datasette = site(prices={"keyed": {"input": 1_000_000, "output": 0}}, concurrency=1)
    with registered(Keyed(script, model_id="keyed")):
        async with (
            LLM(datasette).group("keyed", purpose="testing", actor={"id": "ana"}) as model,
            anyio.create_task_group() as tasks,
        ):
            await (await model.prompt("one two")).text()
            waiting = await model.prompt("wait")
            tasks.start_soon(model.prompt, "another")
            await begun.wait()
            await anyio.lowlevel.checkpoint()
            told = await read(datasette, "?live=1")
            page = (await get(datasette, "/-/llm", ROOT)).text
            go_on.set()
            await waiting.text()
    (lane,) = [lane for lane in told["lanes"] if lane["model"] == "keyed"]
    assert (lane["state"], lane["limit"], lane["in_flight"], lane["waiting"]) == ("open", 1, 1, 1)
    assert lane["key"] == "environment variable MY_PROVIDER_KEY"
    assert lane["hour"]["requests"] == 1
    assert (lane["hour"]["input_tokens"], lane["hour"]["cost"]) == (2, 2.0)
    (group,) = told["groups"]
    assert (group["model"], group["purpose"], group["actor"]) == ("keyed", "testing", "ana")
    assert (group["running"], group["waiting"], group["succeeded"]) == (1, 1, 1)
    assert told["minutes"][-1] == {"minutes_ago": 0, "answered": 1, "refused": 0, "failed": 0}
    assert len(told["minutes"]) == 60
    assert "models" not in told
    assert "environment variable MY_PROVIDER_KEY" in page
    assert "$2.0000" in page
    assert KEY not in page + json.dumps(told)
    assert (await read(datasette))["groups"] == []


async def test_workers_are_told_with_what_they_do_and_how_many_were_lost() -> None:
    go_on = anyio.Event()

    async def script(prompt: str) -> AsyncGenerator[Any, None]:
        yield "begun"
        await go_on.wait()

    datasette = site()
    with registered(FakeModel(script)):
        assert (await read(datasette, "?live=1"))["workers"] == []
        async with (
            fake_workers("near") as workers,
            LLM(datasette).group("fake", workers=workers.spec) as model,
        ):
            workers.fleet._prompts["far"] = 3
            workers.fleet._deaths.count = 1
            response = await model.prompt("x")
            assert await anext(aiter(response)) == "begun"
            told = await read(datasette, "?live=1")
            page = (await get(datasette, "/-/llm")).text
            go_on.set()
            await response.text()
    assert told["workers"] == [
        {"worker": "near", "is": "there", "in_flight": 1, "prompts": 0},
        {"worker": "far", "is": "gone", "in_flight": 0, "prompts": 3},
    ]
    assert told["groups"][0]["calls_made_by"] == "1 worker, 1 lost"
    assert "1 worker, 1 lost" in page
    assert "Workers that make calls now" in page


async def test_models_and_purposes_with_their_keys_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(Keyed):
        needs_key = "other"
        key_env_var = ""

    monkeypatch.setenv("DATASETTE_SECRETS_MINE", KEY)
    settings = {
        "purposes": {"sorting": {"model": {"model": "keyed", "key": "MINE"}}, "asking": {"model": "gone"}},
        "default_model": "other",
    }
    purposes = [Purpose("sorting", "Sort <b>things</b>"), Purpose("new")]
    with (
        llm_models(Keyed(model_id="keyed"), Other(model_id="other"), FakeModel()),
        hooked(register_llm_purposes=lambda datasette: purposes),
    ):
        datasette = site(**settings)
        told = await read(datasette)
        page = (await get(datasette, "/-/llm", ROOT)).text
    models = {model["model"]: model for model in told["models"]}
    assert models["fake"] == {
        "model": "fake",
        "provider": "tests",
        "key": None,
        "needs_key": False,
        "missing": None,
        "shared_clients": False,
    }
    assert models["keyed"]["missing"] == (
        "no key: set the secret MY-PROVIDER_API_KEY, or run: llm keys set my-provider, "
        "or start the server with MY_PROVIDER_KEY"
    )
    assert models["gpt-4o-mini"]["shared_clients"] is True
    purposes_told = {each["purpose"]: each for each in told["purposes"]}
    assert purposes_told["sorting"]["key"] == "environment variable DATASETTE_SECRETS_MINE"
    assert purposes_told["sorting"]["missing"] is None
    assert purposes_told["new"]["model"] == "other"
    assert purposes_told["new"]["missing"].startswith("no key: set the secret OTHER_API_KEY")
    assert "Unknown model: 'gone'" in purposes_told["asking"]["missing"]
    assert any("unknown model 'gone'" in problem for problem in told["problems"])
    assert "Sort &lt;b&gt;things&lt;/b&gt;" in page
    assert KEY not in page + json.dumps(told)


@pytest.mark.usefixtures("_fake")
async def test_a_test_prompt_is_answered_in_the_page_or_as_json() -> None:
    datasette = site(default_model="fake", prices={"fake": {"input": 2_000_000, "output": 1_000_000}})
    page = await post(datasette, {"target": "purpose:enrichments"})
    assert "fake answered</strong>" in page.text
    assert 'value="purpose:enrichments" selected' in page.text
    assert "6 tokens sent, 1 received, $13.000000." in page.text
    told = (await post(datasette, {"target": "model:fake"}, accept="application/json")).json()
    assert told.pop("seconds") >= 0
    assert told == {
        "ok": True,
        "model": "fake",
        "purpose": None,
        "answer": "Answer with the one word OK.",
        "finish_reason": "unknown",
        "input_tokens": 6,
        "output_tokens": 1,
        "cost": 13.0,
    }


async def test_a_test_prompt_that_fails_says_why_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusedError(Exception):
        status_code = 401

    async def script(prompt: str) -> AsyncGenerator[Any, None]:
        raise RefusedError(f"Incorrect API key provided: {KEY} <b>")
        yield ""

    monkeypatch.setenv("MY_PROVIDER_KEY", KEY)
    with registered(Keyed(script, model_id="keyed")):
        datasette = site()
        page = (await post(datasette, {"target": "model:keyed"})).text
        nothing = (await post(datasette, {})).text
        gone = (await post(datasette, {"target": "model:gone"})).text
    assert "keyed did not answer</strong>" in page
    assert "RefusedError: Incorrect API key provided: *** &lt;b&gt;" in page
    assert "The API key is refused: give another one." in page
    assert KEY not in page
    assert "No model was asked for and no default is configured" in nothing
    assert "Unknown model: &#39;gone&#39;" in gone


@pytest.mark.usefixtures("_fake")
async def test_what_an_actor_may_not_use_is_no_test_either() -> None:
    with hooked(llm_filter_models=lambda models, actor: []):
        told = (await post(site(), {"target": "model:fake"})).text
    assert "is not available: a plugin excludes it" in told


@pytest.mark.usefixtures("_fake")
async def test_a_form_of_another_site_is_refused() -> None:
    # Older Datasettes ask for the token of their own form, newer ones where the form comes from.
    datasette = site()
    headers = {"origin": "https://elsewhere.example", "sec-fetch-site": "cross-site"}
    cookies = {"ds_actor": datasette.client.actor_cookie(ROOT)}
    answer = await datasette.client.post(
        "/-/llm/test", data={"target": "model:fake"}, headers=headers, cookies=cookies
    )
    assert answer.status_code == 403


async def test_however_many_lanes_there_are_so_many_are_told() -> None:
    datasette = site()
    with registered(FakeModel()):
        for number in range(MOST + 7):
            get_throttle(None, f"model-{number}", PromptSettings()).hour.ended("ok")
        told = read_live(datasette)
    assert len(told["lanes"]) == MOST
    assert told["lanes_not_shown"] >= 7
    assert told["lanes"][0]["model"] == f"model-{MOST + 6}"
    assert told["minutes"][-1]["answered"] == MOST + 7


async def test_looking_reads_no_database_but_for_the_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    datasette = site()
    await read(datasette, "?live=1")
    names = []
    real = Database.execute

    async def execute(self: Database, sql: str, *args: Any, **kwargs: Any) -> Any:
        names.append(self.name)
        return await real(self, sql, *args, **kwargs)

    monkeypatch.setattr(Database, "execute", execute)
    await read(datasette, "?live=1")
    assert set(names) <= {datasette.get_internal_database().name}


async def test_those_who_ask_within_a_second_share_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    datasette, other = site(), site()
    monkeypatch.setattr(live, "KEPT_SECONDS", 3600.0)
    first = live.latest(datasette)
    get_throttle(None, "model-since", PromptSettings()).hour.ended("ok")
    assert all(live.latest(datasette) is first for _ in range(10))
    assert live.latest(other) is not first
    monkeypatch.setattr(live, "KEPT_SECONDS", 0.0)
    assert live.latest(datasette)["lanes"][0]["model"] == "model-since"
