"""``LLM``: what existing plugins call, and how."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import llm
import pytest

from datasette_llm import LLM, GroupModel, WrappedAsyncModel
from datasette_llm.errors import ModelNotFoundError
from datasette_llm.pace.policy import ConcurrencyBounds, RateLimit, RetryPolicy

from .fakes import FakeModel, registered
from .hooks import datasette_with, hooked

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _two_models() -> Iterator[None]:
    with registered(FakeModel(model_id="one"), FakeModel(model_id="two")):
        yield


def test_signatures_that_plugins_rely_on() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)[1:]

    assert names(LLM.model) == ["model_id", "purpose", "actor"]
    assert names(LLM.models) == ["actor", "purpose"]
    assert names(LLM.group)[:5] == ["model_id", "purpose", "actor", "concurrency", "on_error"]
    assert names(LLM.get_key_for_model) == ["model", "actor", "purpose"]
    assert names(LLM.model_has_key) == ["model", "actor", "purpose"]
    assert names(LLM._get_purpose_key_for_model) == ["model_id", "purpose"]
    assert names(LLM._resolve_model_id) == ["model_id", "purpose", "actor"]


async def test_a_model_for_a_purpose_and_an_actor() -> None:
    model = await LLM(datasette_with()).model("one", purpose="p", actor={"id": "x"})
    assert isinstance(model, WrappedAsyncModel)
    assert (model.model_id, model.purpose, model.actor) == ("one", "p", {"id": "x"})
    response = await model.prompt("hello")
    assert await response.text() == "hello"


async def test_a_group() -> None:
    async with LLM(datasette_with({"default_model": "two"})).group(purpose="p", concurrency=3) as model:
        assert isinstance(model, GroupModel)
        assert (model.group.model_id, model.group.purpose) == ("two", "p")
        assert await (await model.prompt("hello")).text() == "hello"
        assert model.stats.concurrency == 3


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"concurrency": 0}, ValueError),
        ({"concurrency": -1}, ValueError),
        ({"concurrency": "many"}, TypeError),
        ({"concurrency": True}, TypeError),
        ({"on_error": "ignore"}, ValueError),
    ],
)
async def test_a_group_with_wrong_arguments(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        async with LLM(datasette_with()).group("one", **wrong):
            pass


async def test_a_choice_carries_what_was_configured() -> None:
    llm_ = LLM(
        datasette_with(
            {
                "timeout": 9,
                "retries": {"attempts": 2},
                "rate_limits": {"one": {"requests_per_minute": 60, "tokens_per_minute": 100}},
                "purposes": {
                    "p": {"concurrency": 7, "model": {"model": "one", "options": {"temperature": 0.5}}},
                },
            }
        )
    )
    choice = await llm_._choose(None, "p", None)
    assert choice.model_id == "one"
    assert choice.options == {"temperature": 0.5}
    assert choice.settings.concurrency == 7
    assert choice.settings.timeout == 9.0
    assert choice.settings.retries == RetryPolicy(2, 120.0)
    assert choice.settings.rate_limit == RateLimit(60, 100)
    other = await llm_._choose("two", None, None)
    assert other.options == {}
    assert other.settings.rate_limit is None
    assert other.settings.concurrency == ConcurrencyBounds()


async def test_configured_options_are_defaults() -> None:
    reference = {"model": "one", "options": {"temperature": 0.5}}
    model = await LLM(datasette_with({"default_model": reference})).model()
    response = await model.prompt("hi")
    await response.text()
    assert vars(response.prompt.options)["temperature"] == 0.5
    response = await model.prompt("hi", temperature=0.9)
    await response.text()
    assert vars(response.prompt.options)["temperature"] == 0.9


async def test_no_two_callers_share_a_model() -> None:
    llm_ = LLM(datasette_with())
    one, other = await llm_.model("one"), await llm_.model("one")
    assert one.model is not other.model
    (listed,) = [model for model in await llm_.models() if model.model_id == "one"]
    listed.key = "changed"
    assert llm.get_async_model("one").key is None
    assert (await llm_.model("one")).model.key is None


async def test_resolving_an_id_asks_hooks_and_aliases_and_refuses_nothing() -> None:
    llm.set_alias("uno", "one")
    llm_ = LLM(
        datasette_with(
            {"default_model": "uno", "blocked_models": ["one"], "purposes": {"p": {"model": "two"}}}
        )
    )
    assert await llm_._resolve_model_id(None, None, None) == "one"
    assert await llm_._resolve_model_id(None, "p", None) == "two"
    assert await llm_._resolve_model_id(model_id="uno", purpose="p", actor=None) == "one"
    assert await llm_._resolve_model_id("not installed", None, None) == "not installed"
    with hooked(llm_default_model=lambda: "uno"):
        assert await llm_._resolve_model_id(None, "p", None) == "one"
    with pytest.raises(ModelNotFoundError):
        await LLM(datasette_with())._resolve_model_id(None, None, None)


def test_the_key_of_a_purpose() -> None:
    purposes = {
        "p": {"model": {"model": "one", "key": "KEY_ONE"}, "models": [{"model": "two", "key": "KEY_TWO"}]}
    }
    llm_ = LLM(datasette_with({"default_model": {"model": "one", "key": "GENERAL"}, "purposes": purposes}))
    assert llm_._get_purpose_key_for_model("one", "p") == "KEY_ONE"
    assert llm_._get_purpose_key_for_model("two", "p") == "KEY_TWO"
    assert llm_._get_purpose_key_for_model("one", "q") is None
    assert llm_._get_purpose_key_for_model("one", None) is None
    assert llm_._get_purpose_key_for_model("unknown", "p") is None


async def test_model_can_be_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    async def replaced(self: LLM, *args: Any, **kwargs: Any) -> str:
        return f"replaced {args} {kwargs}"

    monkeypatch.setattr(LLM, "model", replaced)
    answer: Any = await LLM(datasette_with()).model("x", purpose="p")
    assert answer == "replaced ('x',) {'purpose': 'p'}"


@pytest.mark.parametrize("model_id", [5, ["one"], {"model": "one"}])
async def test_a_model_id_that_is_no_text(model_id: Any) -> None:
    with pytest.raises(TypeError, match="model id is text"):
        await LLM(datasette_with()).model(model_id)


async def test_a_wrong_configuration_stops_the_first_use() -> None:
    from datasette.utils import StartupError

    llm_ = LLM(datasette_with({"default_modle": "one"}))
    for attempt in (llm_.model, llm_.models):
        with pytest.raises(StartupError, match="did you mean default_model"):
            await attempt()
