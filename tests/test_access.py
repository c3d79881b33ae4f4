"""Who may use which model: lists, defaults, order and hooks."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import llm
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasette_llm.access.catalog import Snapshot, get_snapshot
from datasette_llm.access.permissions import Plan, get_plan
from datasette_llm.access.settings import parse_settings
from datasette_llm.errors import ModelNotFoundError
from datasette_llm.facade import LLM
from datasette_llm.pace.policy import RateLimit

from .fakes import FakeModel, registered
from .hooks import datasette_with, hooked, llm_models

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

INSTALLED = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _four_models() -> Iterator[None]:
    with registered(*(FakeModel(model_id=model_id) for model_id in INSTALLED)):
        yield


async def ids(config: Any, purpose: str | None = None, actor: Any = None) -> list[str]:
    models = await LLM(datasette_with(config)).models(actor=actor, purpose=purpose)
    return [model.model_id for model in models if model.model_id in INSTALLED]


# Each: the configuration, what models() offers without a purpose, and what it offers for "p".
ORDERS: list[tuple[Any, list[str], list[str]]] = [
    ({}, ["a", "b", "c", "d"], ["a", "b", "c", "d"]),
    ({"default_model": "c"}, ["c", "a", "b", "d"], ["c", "a", "b", "d"]),
    ({"models": ["d", "b"]}, ["d", "b"], ["d", "b"]),
    ({"models": ["d", "b", "d"], "default_model": "b"}, ["b", "d"], ["b", "d"]),
    # A default belongs to the list it goes with.
    ({"models": ["d"], "default_model": "a"}, ["a", "d"], ["a", "d"]),
    ({"models": []}, [], []),
    ({"models": ["d", "unknown"]}, ["d"], ["d"]),
    ({"blocked_models": ["a", "c"]}, ["b", "d"], ["b", "d"]),
    ({"models": ["a", "b"], "blocked_models": ["a"]}, ["b"], ["b"]),
    # Blocked wins over a default.
    ({"default_model": "a", "blocked_models": ["a"]}, ["b", "c", "d"], ["b", "c", "d"]),
    (
        {"default_model": "a", "purposes": {"p": {"blocked_models": ["a"]}}},
        ["a", "b", "c", "d"],
        ["b", "c", "d"],
    ),
    # A purpose with a list of its own.
    ({"purposes": {"p": {"models": ["c", "b"]}}}, ["a", "b", "c", "d"], ["c", "b"]),
    ({"purposes": {"p": {"model": "d", "models": ["c"]}}}, ["a", "b", "c", "d"], ["d", "c"]),
    ({"models": ["a", "b"], "purposes": {"p": {"models": ["d", "b"]}}}, ["a", "b"], ["d", "b", "a"]),
    (
        {"default_model": "c", "models": ["a"], "purposes": {"p": {"models": ["d"]}}},
        ["c", "a"],
        ["c", "d", "a"],
    ),
    (
        {"default_model": "c", "models": ["a"], "purposes": {"p": {"model": "b", "models": ["d"]}}},
        ["c", "a"],
        ["b", "d", "a", "c"],
    ),
    ({"default_model": "c", "purposes": {"p": {"models": ["d"]}}}, ["c", "a", "b", "d"], ["d"]),
    (
        {"models": ["a"], "blocked_models": ["d"], "purposes": {"p": {"models": ["d", "c"]}}},
        ["a"],
        ["c", "a"],
    ),
    # A purpose's model without a list is a default, not a limit.
    ({"purposes": {"p": {"model": "d"}}}, ["a", "b", "c", "d"], ["d", "a", "b", "c"]),
    ({"models": ["a"], "purposes": {"p": {"model": "d"}}}, ["a"], ["d", "a"]),
    ({"purposes": {"p": {"models": []}}}, ["a", "b", "c", "d"], []),
    # Exclusive.
    ({"models": ["a"], "purposes": {"p": {"models": ["d"], "exclusive": True}}}, ["a"], ["d"]),
    ({"models": ["a"], "purposes": {"p": {"model": "d", "exclusive": True}}}, ["a"], ["d"]),
    (
        {"default_model": "c", "models": ["a"], "purposes": {"p": {"models": ["d", "b"], "exclusive": True}}},
        ["c", "a"],
        ["d", "b"],
    ),
    ({"purposes": {"p": None}, "default_model": {"model": "d"}}, ["d", "a", "b", "c"], ["d", "a", "b", "c"]),
]


@pytest.mark.parametrize(
    ("config", "general", "purpose"), ORDERS, ids=[str(config) for config, _, _ in ORDERS]
)
async def test_lists_and_order(config: Any, general: list[str], purpose: list[str]) -> None:
    assert await ids({**config, "require_keys": False}) == general
    assert await ids({**config, "require_keys": False}, "p") == purpose
    assert await ids({**config, "require_keys": False}, "another") == general


async def test_aliases_are_accepted_everywhere_in_the_configuration(llm_user_path: Any) -> None:
    for model_id in INSTALLED:
        llm.set_alias(f"alias-{model_id}", model_id)
    config = {
        "default_model": {"model": "alias-a", "options": {"temperature": 1}},
        "models": ["alias-b"],
        "blocked_models": ["alias-c"],
        "rate_limits": {"alias-d": {"requests_per_minute": 5}},
        "purposes": {"p": {"models": [{"model": "alias-d", "key": "DKEY"}, "alias-c"]}},
    }
    assert await ids(config, "p") == ["a", "d", "b"]
    plan = get_plan(datasette_with(config), "p")
    assert plan.options("a") == {"temperature": 1}
    assert plan.key_names("d") == ["DKEY"]
    assert plan.purpose_key("alias-d") == "DKEY"
    assert plan.prompt_settings("d").rate_limit == RateLimit(5, None)
    assert plan.prompt_settings("a").rate_limit is None
    assert (await LLM(datasette_with(config)).model("alias-d", purpose="p")).model_id == "d"


def test_options_of_the_nearest_reference_win() -> None:
    plan = Plan(
        parse_settings(
            {
                "default_model": {"model": "a", "options": {"x": "general", "y": "general", "z": "general"}},
                "purposes": {
                    "p": {
                        "model": {"model": "a", "options": {"x": "model"}},
                        "models": [{"model": "a", "options": {"x": "list", "y": "list"}}],
                    }
                },
            }
        ),
        get_snapshot(),
        "p",
    )
    assert plan.options("a") == {"x": "model", "y": "list", "z": "general"}
    assert plan.options("b") == {}


# Which model.


async def test_the_default_is_asked_of_hooks_then_of_the_configuration() -> None:
    config = {"default_model": "a", "purposes": {"p": {"model": "b"}}}
    llm_ = LLM(datasette_with(config))
    assert (await llm_.model()).model_id == "a"
    assert (await llm_.model("")).model_id == "a"
    assert (await llm_.model(purpose="p")).model_id == "b"
    assert (await llm_.model("d", purpose="p")).model_id == "d"

    seen: list[Any] = []

    async def asks(purpose: str | None, actor: Any) -> str | None:
        seen.append((purpose, actor))
        return "c" if actor else None

    with hooked(llm_default_model=asks):
        assert (await llm_.model(purpose="p", actor={"id": "x"})).model_id == "c"
        assert (await llm_.model(purpose="p")).model_id == "b"
        assert (await llm_.model("d", actor={"id": "x"})).model_id == "d"
    assert seen == [("p", {"id": "x"}), ("p", None)]


async def test_the_first_hook_answer_that_is_not_none_wins() -> None:
    # pluggy asks the plugin that was registered last first.
    async def never_awaited() -> str:
        return "b"

    with (
        hooked(llm_default_model=lambda datasette: never_awaited()),
        hooked(llm_default_model=lambda: "c"),
        hooked(llm_default_model=lambda: None),
    ):
        assert (await LLM(datasette_with()).model()).model_id == "c"
    gc.collect()  # A coroutine left unawaited would warn here.


@pytest.mark.parametrize(
    ("purpose", "place"), [(None, ""), ("p", "plugins.datasette-llm.purposes.p.model or ")]
)
async def test_without_any_default_the_error_says_how_to_set_one(purpose: str | None, place: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        await LLM(datasette_with()).model(purpose=purpose)
    assert str(caught.value).endswith(f"set {place}plugins.datasette-llm.default_model")


async def test_an_unknown_model_is_named_with_its_neighbours() -> None:
    with (
        llm_models(FakeModel(model_id="almost-the-model")),
        pytest.raises(llm.UnknownModelError, match="almost-the-model") as caught,
    ):
        await LLM(datasette_with()).model("almost-the-modle")
    assert isinstance(caught.value, ModelNotFoundError)


@pytest.mark.parametrize("junk", [5, ["a"], {"model": "a"}, object()])
async def test_a_default_hook_that_answers_junk(junk: Any) -> None:
    with hooked(llm_default_model=lambda: junk), pytest.raises(TypeError, match="model id is text"):
        await LLM(datasette_with()).model()


# Hooks that filter.


def without(*model_ids: str) -> Any:
    def llm_filter_models(models: Sequence[Any]) -> list[Any]:
        return [model for model in models if model.model_id not in model_ids]

    return llm_filter_models


async def test_what_any_hook_removes_stays_removed() -> None:
    async def asynchronous(datasette: Any, models: Any, actor: Any, purpose: Any) -> Any:
        return without("b")(models)

    with (
        hooked(llm_filter_models=without("a")),
        hooked(llm_filter_models=asynchronous),
        hooked(llm_filter_models=lambda models: None),
        hooked(llm_filter_models=lambda models: list(models)[::-1]),
    ):
        assert await ids({}) == ["c", "d"]
        assert await ids({"blocked_models": ["c"]}) == ["d"]


async def test_hooks_can_not_bring_back_what_the_configuration_removed() -> None:
    with hooked(llm_filter_models=lambda: get_snapshot().for_hooks.values()):
        assert await ids({"models": ["a", "b"], "blocked_models": ["b"]}) == ["a"]


async def test_filter_hooks_may_answer_with_ids_and_with_any_iterable() -> None:
    with hooked(llm_filter_models=lambda: iter(("b", "d", "unknown"))):
        assert await ids({}) == ["b", "d"]


async def test_filter_hooks_are_told_whom_it_is_for() -> None:
    seen: list[Any] = []
    with hooked(llm_filter_models=lambda actor, purpose: seen.append((actor, purpose))):
        await ids({}, "p", {"id": "x"})
        await LLM(datasette_with()).model("a", "p", {"id": "y"})
    assert seen == [({"id": "x"}, "p"), ({"id": "y"}, "p")]


async def test_what_hooks_do_to_models_reaches_nobody() -> None:
    def meddle(models: Any) -> None:
        for model in models:
            model.key = "meddled"

    with hooked(llm_filter_models=meddle):
        assert {model.key for model in await LLM(datasette_with()).models()} == {None}
        assert (await LLM(datasette_with()).model("a")).model.key is None


@pytest.mark.parametrize("junk", [5, "a", {"a": 1}, object()])
async def test_a_filter_hook_that_answers_junk_lets_nothing_through(junk: Any) -> None:
    with hooked(llm_filter_models=lambda: junk):
        with pytest.raises(TypeError, match="llm_filter_models hook returned"):
            await ids({})
        with pytest.raises(TypeError, match="llm_filter_models hook returned"):
            await LLM(datasette_with()).model("a")


async def test_a_filter_hook_that_fails_lets_nothing_through() -> None:
    async def never_awaited() -> None: ...

    async def fails() -> None:
        raise ZeroDivisionError

    with (
        hooked(llm_filter_models=lambda models: never_awaited()),
        hooked(llm_filter_models=fails),
        pytest.raises(ZeroDivisionError),
    ):
        await LLM(datasette_with()).model("a")
    gc.collect()


async def test_a_filter_hook_may_itself_use_a_model() -> None:
    datasette = datasette_with()
    asked: list[str] = []

    async def judge(datasette: Any, models: Any) -> Any:
        asked.append((await LLM(datasette).model("a")).model_id)
        return [model for model in models if model.model_id != "b"]

    with hooked(llm_filter_models=judge):
        assert (await LLM(datasette).model("c")).model_id == "c"
        with pytest.raises(ModelNotFoundError):
            await LLM(datasette).model("b")
    assert asked == ["a", "a"]


async def test_a_default_hook_may_ask_for_the_models() -> None:
    async def last(datasette: Any, actor: Any, purpose: Any) -> Any:
        return (await LLM(datasette).models(actor=actor, purpose=purpose))[-1].model_id

    with hooked(llm_default_model=last):
        config = {"models": ["b", "c"]}
        assert (await LLM(datasette_with(config)).model()).model_id == "c"
        assert await ids(config) == ["b", "c"]


# Enforcement.


async def refused(config: Any, model_id: str | None, purpose: str | None = None) -> str:
    """Return why both ways of getting a model refuse it; empty if both give it."""
    llm_ = LLM(datasette_with(config))
    reasons = []
    for attempt in (lambda: llm_.model(model_id, purpose), lambda: _open_group(llm_, model_id, purpose)):
        try:
            await attempt()
        except ModelNotFoundError as error:
            reasons.append(str(error))
        else:
            reasons.append("")
    assert reasons[0] == reasons[1]
    return reasons[0]


async def _open_group(llm_: LLM, model_id: str | None, purpose: str | None) -> None:
    async with llm_.group(model_id, purpose) as model:
        assert model.model_id


@pytest.mark.parametrize(
    ("config", "model_id", "purpose"),
    [
        ({"blocked_models": ["a"]}, "a", None),
        ({"models": ["b"]}, "a", None),
        ({"models": []}, "a", None),
        ({"purposes": {"p": {"blocked_models": ["a"]}}}, "a", "p"),
        ({"purposes": {"p": {"models": ["b"]}}}, "a", "p"),
        ({"models": ["a"], "purposes": {"p": {"models": ["b"], "exclusive": True}}}, "a", "p"),
        # Defaults, too.
        ({"default_model": "a", "blocked_models": ["a"]}, None, None),
        ({"purposes": {"p": {"model": "a", "blocked_models": ["a"]}}}, None, "p"),
        ({"default_model": "a", "purposes": {"p": {"models": ["b"], "exclusive": True}}}, None, "p"),
    ],
)
async def test_what_the_configuration_excludes_is_refused(config: Any, model_id: Any, purpose: Any) -> None:
    assert "'a' is not available" in await refused(config, model_id, purpose)
    assert "configuration" in await refused({**config, "enforce": "config"}, model_id, purpose)
    assert await refused({**config, "enforce": "none"}, model_id, purpose) == ""


async def test_what_hooks_exclude_is_refused() -> None:
    with hooked(llm_filter_models=without("a")):
        for config in ({}, {"enforce": "all"}, {"enforce": None}):
            assert "a plugin excludes it" in await refused(config, "a", "p")
        assert "a plugin excludes it" in await refused({"default_model": "a"}, None)
        assert await refused({}, "b") == ""
        assert await refused({"enforce": "config"}, "a") == ""
        assert await refused({"enforce": "none"}, "a") == ""


async def test_a_group_asks_the_hooks_once() -> None:
    asked: list[int] = []
    with hooked(llm_filter_models=lambda: asked.append(1)):
        async with LLM(datasette_with()).group("a") as model:
            for number in range(3):
                await model.prompt(f"prompt {number}")
    assert asked == [1]


# Bookkeeping.


def test_plans_follow_configuration_and_models_and_do_not_pile_up() -> None:
    datasette = datasette_with({"purposes": {"p": {"model": "a"}}})
    plan = get_plan(datasette, "p")
    assert get_plan(datasette, "p") is plan
    assert get_plan(datasette, "anything") is get_plan(datasette, None)
    datasette.config["plugins"]["datasette-llm"]["purposes"]["p"]["model"] = "b"
    assert get_plan(datasette, "p").default == "b"
    before = get_plan(datasette, "p")
    with llm_models(FakeModel(model_id="e")):
        assert "e" in get_plan(datasette, "p").ids
    assert "e" not in get_plan(datasette, "p").ids
    assert before is not plan


names = st.lists(st.sampled_from((*INSTALLED, "unknown")), max_size=4)
maybe_name = st.none() | st.sampled_from((*INSTALLED, "unknown"))


@given(
    default=maybe_name,
    general=st.none() | names,
    blocked=names,
    model=maybe_name,
    own=st.none() | names,
    own_blocked=names,
    exclusive=st.booleans(),
)
def test_lists_keep_their_promises(
    default: str | None,
    general: list[str] | None,
    blocked: list[str],
    model: str | None,
    own: list[str] | None,
    own_blocked: list[str],
    exclusive: bool,
) -> None:
    exclusive = exclusive and (model is not None or own is not None)
    section = {"model": model, "models": own, "blocked_models": own_blocked, "exclusive": exclusive}
    config = {
        "default_model": default,
        "models": general,
        "blocked_models": blocked,
        "purposes": {"p": section},
    }
    entries = [
        type("Entry", (), {"model": m, "async_model": m, "aliases": ()}) for m in map(_fake, INSTALLED)
    ]
    plan = Plan(parse_settings(config), Snapshot(entries), "p")

    offered = set(plan.ids)
    assert len(offered) == len(plan.ids)
    assert offered <= set(INSTALLED) - set(blocked) - set(own_blocked)
    if exclusive:
        assert offered <= {*(own or ()), model}
    if general is not None and not exclusive:
        assert offered <= {*(own or ()), *general, model, default}
    if model in INSTALLED and model not in {*blocked, *own_blocked}:
        assert plan.ids[0] == model
    assert all(plan.permits(model_id) == (model_id in offered) for model_id in (*INSTALLED, "unknown"))


def _fake(model_id: str) -> FakeModel:
    return FakeModel(model_id=model_id)
