"""The configuration: every mistake is named with its path, and nothing else gets through."""

from __future__ import annotations

import datetime
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from datasette.app import Datasette
from datasette.utils import StartupError
from hypothesis import given
from hypothesis import strategies as st

from datasette_llm.access.sections import PluginSettings, RateLimits
from datasette_llm.access.settings import get_settings, parse_settings
from datasette_llm.calls.workers import workers_from
from datasette_llm.pace.policy import ConcurrencyBounds, PromptSettings, RateLimit, RetryPolicy

from .hooks import datasette_with

ROOT = "plugins.datasette-llm"

MISTAKES: list[tuple[Any, list[str]]] = [
    # A typo in each section.
    ({"default_modle": "m"}, [".default_modle: unknown key; did you mean default_model?"]),
    ({"requires_key": True}, [".requires_key: unknown key; did you mean require_keys?"]),
    (
        {"purposes": {"extract": {"modle": "m"}}},
        [".purposes.extract.modle: unknown key; did you mean model?"],
    ),
    (
        {"purposes": {"models": {"blocked_model": []}}},
        [".purposes.models.blocked_model: unknown key; did you mean blocked_models?"],
    ),
    (
        {"purposes": {"x": {"models": ["m", {"model": "m", "optoins": {}}]}}},
        [".purposes.x.models.1.optoins: unknown key; did you mean options?"],
    ),
    ({"default_model": {"model": "m", "kye": "K"}}, [".default_model.kye: unknown key; did you mean key?"]),
    ({"concurrency": {"strat": 1}}, [".concurrency.strat: unknown key; did you mean start?"]),
    ({"retries": {"attemps": 1}}, [".retries.attemps: unknown key; did you mean attempts?"]),
    (
        {"rate_limits": {"retries": {"request_per_minute": 1}}},
        [".rate_limits.retries.request_per_minute: unknown key; did you mean requests_per_minute?"],
    ),
    (
        {"purposes": {"x": {"retries": {"timout": 1}, "concurrency": {"maxx": 3}}}},
        [
            ".purposes.x.retries.timout: unknown key; did you mean timeout?",
            ".purposes.x.concurrency.maxx: unknown key; did you mean max?",
        ],
    ),
    ({"retries": {"zzz": 1}}, [".retries.zzz: unknown key; the keys here are attempts, timeout"]),
    # What a section is.
    ("gpt-4o", [": must be a mapping, not text"]),
    (["gpt-4o"], [": must be a mapping, not a list"]),
    (3, [": must be a mapping, not a number"]),
    ({"purposes": []}, [".purposes: must be a mapping, not a list"]),
    ({"purposes": {"x": "m"}}, [".purposes.x: must be a mapping, not text"]),
    ({"rate_limits": 5}, [".rate_limits: must be a mapping, not a number"]),
    ({"rate_limits": {"m": 5}}, [".rate_limits.m: must be a mapping, not a number"]),
    ({"retries": 3}, [".retries: must be a mapping, not a number"]),
    # Models.
    ({"default_model": {"key": "K"}}, [".default_model.model: is missing"]),
    ({"purposes": {"x": {"model": {"key": "K"}}}}, [".purposes.x.model.model: is missing"]),
    ({"purposes": {"x": {"models": [{"options": {}}]}}}, [".purposes.x.models.0.model: is missing"]),
    ({"default_model": 4}, [".default_model: must be a model id, not a number: put it in quotes"]),
    (
        {"default_model": ["m"]},
        [".default_model: must be a model id or a mapping with model, key and options, not a list"],
    ),
    ({"models": [datetime.date(2025, 8, 7)]}, [".models.0: must be text, not a date"]),
    ({"default_model": ""}, [".default_model: must not be empty"]),
    (
        {"default_model": {"model": 3.5}},
        [".default_model.model: must be text, not a number: put it in quotes"],
    ),
    (
        {"default_model": {"model": "m", "options": []}},
        [".default_model.options: must be a mapping, not a list"],
    ),
    ({"models": "m"}, [".models: must be a list, not text"]),
    ({"models": [{"model": "m"}]}, [".models.0: must be text, not a mapping"]),
    (
        {"blocked_models": [1, None, True]},
        [
            ".blocked_models.0: must be text, not a number: put it in quotes",
            ".blocked_models.1: must be text, not nothing",
            ".blocked_models.2: must be text, not true or false",
        ],
    ),
    (
        {"purposes": {"x": {"exclusive": True}}},
        [".purposes.x: exclusive needs models (or model): it limits the purpose to its own list"],
    ),
    ({"purposes": {"x": {"exclusive": "yes"}}}, [".purposes.x.exclusive: must be true or false, not text"]),
    # Pace.
    ({"concurrency": -1}, [".concurrency: must be at least 1"]),
    ({"concurrency": 0}, [".concurrency: must be at least 1"]),
    ({"concurrency": True}, [".concurrency: must be a number, not true or false"]),
    ({"concurrency": "lots"}, [".concurrency: must be a whole number, not text"]),
    ({"concurrency": 2.5}, [".concurrency: must be a whole number"]),
    ({"concurrency": {"min": 5, "max": 2}}, [".concurrency: min, start and max must be in that order"]),
    ({"concurrency": {"start": 9, "max": 2}}, [".concurrency: min, start and max must be in that order"]),
    ({"concurrency": {"min": -5}}, [".concurrency.min: must be at least 1"]),
    ({"purposes": {"x": {"concurrency": -3}}}, [".purposes.x.concurrency: must be at least 1"]),
    ({"timeout": "soon"}, [".timeout: must be a number of seconds, not text"]),
    ({"timeout": [1]}, [".timeout: must be a number of seconds, not a list"]),
    ({"timeout": 0}, [".timeout: must be more than 0"]),
    ({"timeout": float("inf")}, [".timeout: must be a finite number"]),
    (
        {"retries": {"attempts": 0, "timeout": -1}},
        [".retries.attempts: must be at least 1", ".retries.timeout: must"],
    ),
    (
        {"rate_limits": {"m": {"tokens_per_minute": -1}}},
        [".rate_limits.m.tokens_per_minute: must be at least 1"],
    ),
    # Choices.
    ({"require_keys": "maybe"}, [".require_keys: must be true or false, not text"]),
    ({"require_keys": 1}, [".require_keys: must be true or false, not a number"]),
    ({"enforce": "some"}, [".enforce: must be 'all', 'config' or 'none'"]),
    ({"enforce": False}, [".enforce: must be 'all', 'config' or 'none'"]),
    # Workers.
    ({"workers": True}, [".workers: workers must be a number of processes or a scheduler's address"]),
    ({"workers": [2]}, [".workers: workers must be a number of processes, a scheduler's address"]),
    ({"workers": "somewhere"}, [".workers: 'somewhere' is no scheduler's address"]),
    ({"workers": {"address": "tls://h:1"}}, [".workers: workers has no setting 'address'"]),
    ({"workers": {"security": {}}}, [".workers: scheduler must be an address"]),
    (
        {"workers": {"scheduler": "tls://h:1", "security": {"pem": "x"}}},
        [".workers: security takes the file"],
    ),
    (
        {"purposes": {"x": {"workers": {"scheduler": "tls://h:1", "timeout": 0}}}},
        [".purposes.x.workers: timeout must be a number of seconds, not 0"],
    ),
]


@pytest.mark.parametrize(("config", "expected"), MISTAKES, ids=[str(config) for config, _ in MISTAKES])
def test_a_mistake_is_named_with_its_path(config: Any, expected: list[str]) -> None:
    with pytest.raises(StartupError) as caught:
        parse_settings(config)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected)
    for line, start in zip(sorted(lines), sorted(expected), strict=True):
        assert line.startswith(ROOT + start)


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(StartupError) as caught:
        parse_settings(
            {"concurrency": -1, "purposes": {"a": {"modle": 1}, "b": {"timeout": "x"}}, "mdoels": []}
        )
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    "key",
    [
        "sk-proj-abcdefghijklmnop",
        "AIzaSyExample",
        "two words",
        "a/b",
        "gsk_abcdefghijklmnop1234",
        "hf_abcdefghijklmnopqrst",
    ],
)
def test_a_pasted_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(StartupError, match="name of a secret") as caught:
        parse_settings({"default_model": {"model": "m", "key": key}})
    assert key not in str(caught.value)


@pytest.mark.parametrize("key", ["CUSTOM_OPENAI_KEY", "k", "sk_key", "my-key"])
def test_a_name_of_a_secret_is_accepted(key: str) -> None:
    reference = parse_settings({"default_model": {"model": "m", "key": key}}).default_model
    assert reference is not None
    assert reference.key == key


SECRET = "sk-not-to-be-seen-anywhere-1234567890"


@pytest.mark.parametrize(
    "config",
    [
        SECRET,
        {"default_model": [SECRET]},
        {"default_model": {"key": SECRET}},
        {"timeout": SECRET},
        {"models": SECRET},
        {"enforce": SECRET},
        {"concurrency": {"min": SECRET}},
        {"purposes": {"x": {"model": {"model": "m", "options": SECRET, "key": SECRET}}}},
    ],
)
def test_no_value_is_ever_shown(config: Any) -> None:
    error: BaseException | None
    with pytest.raises(StartupError) as caught:
        parse_settings(config)
    error = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"purposes": None},
        {"purposes": {}},
        {"purposes": {"x": None}},
        {"purposes": {"x": {"model": None, "models": None, "concurrency": None, "exclusive": False}}},
        {"default_model": None, "models": None, "concurrency": None, "timeout": None, "retries": None},
        {"retries": {"attempts": None}, "rate_limits": {"m": None}, "concurrency": {}, "enforce": None},
    ],
)
def test_nothing_means_the_defaults(config: Any) -> None:
    settings = parse_settings(config)
    assert settings.prompt_settings("x", None) == PromptSettings()
    assert list(settings.references()) == []


def test_a_purpose_overrides_what_it_sets_and_inherits_the_rest() -> None:
    settings = parse_settings(
        {
            "concurrency": 5,
            "timeout": 10,
            "retries": {"attempts": 2, "timeout": 30},
            "workers": "2",
            "purposes": {
                "x": {"concurrency": {"max": 8}, "retries": {"attempts": 9}, "workers": 0},
                "patient": {"outage_timeout": 3600},
            },
        }
    )
    assert settings.prompt_settings(None, None) == PromptSettings(5, 10.0, RetryPolicy(2, 30.0))
    assert settings.prompt_settings("other", None) == settings.prompt_settings(None, None)
    assert settings.prompt_settings("patient", None).outage_timeout == 3600
    general = settings.workers_of("other")
    assert general is not None
    assert (general.count, settings.workers_of("x")) == (2, None)
    assert settings.prompt_settings("x", RateLimits(requests_per_minute=60)) == PromptSettings(
        ConcurrencyBounds(8, 1, 8), 10.0, RetryPolicy(9, 30.0), RateLimit(60, None)
    )


@given(
    start=st.none() | st.integers(1, 2000),
    low=st.none() | st.integers(1, 2000),
    high=st.none() | st.integers(1, 2000),
)
def test_bounds_keep_what_is_given_and_stay_in_order(
    start: int | None, low: int | None, high: int | None
) -> None:
    section = {
        name: value for name, value in (("start", start), ("min", low), ("max", high)) if value is not None
    }
    given_in_order = [value for value in (low, start, high) if value is not None]
    if given_in_order != sorted(given_in_order):
        with pytest.raises(StartupError):
            parse_settings({"concurrency": section})
        return
    bounds = parse_settings({"concurrency": section}).prompt_settings(None, None).concurrency
    assert isinstance(bounds, ConcurrencyBounds)
    assert 1 <= bounds.min <= bounds.start <= bounds.max
    for name, value in section.items():
        assert getattr(bounds, name) == value


def test_text_of_a_number_is_accepted_since_environment_variables_are_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLM_CONCURRENCY", "7")
    monkeypatch.setenv("LLM_KEYS", "False")
    datasette = datasette_with(
        {"concurrency": {"$env": "LLM_CONCURRENCY"}, "require_keys": {"$env": "LLM_KEYS"}}
    )
    settings = get_settings(datasette)
    assert settings.prompt_settings(None, None).concurrency == 7
    assert settings.require_keys is False
    assert get_settings(datasette) is settings

    monkeypatch.setenv("LLM_CONCURRENCY", "8")
    assert get_settings(datasette).prompt_settings(None, None).concurrency == 8


def test_an_unset_environment_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_MODEL", raising=False)
    assert get_settings(datasette_with({"default_model": {"$env": "LLM_MODEL"}})).default_model is None


def test_parsed_once_until_the_configuration_changes() -> None:
    datasette = datasette_with({"purposes": {"x": {"models": ["a"]}}})
    settings = get_settings(datasette)
    assert get_settings(datasette) is settings
    datasette.config["plugins"]["datasette-llm"]["purposes"]["x"]["models"].append("b")
    changed = get_settings(datasette)
    assert [reference.model for _, reference in changed.references()] == ["a", "b"]
    datasette.config["plugins"]["datasette-llm"] = {"mdoels": []}
    for _ in range(2):
        with pytest.raises(StartupError, match="mdoels"):
            get_settings(datasette)


class Double:
    """Something that is only like a Datasette."""

    def plugin_config(self, name: str) -> Any:
        return {"concurrency": 3}


def test_something_that_is_only_like_a_datasette() -> None:
    double: Any = Double()
    assert get_settings(double) is get_settings(double)
    assert get_settings(double).concurrency == 3


def test_each_datasette_has_its_own_and_is_not_kept_alive() -> None:
    one: Any = Double()
    assert get_settings(one) != get_settings(datasette_with())
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None


def test_a_datasette_without_any_configuration() -> None:
    assert get_settings(Datasette()) == PluginSettings()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"prices": {"m": {"input": "cheap", "output": 1}}}, ".prices.m.input: must be a number of dollars"),
        ({"prices": {"m": {"input": 1}}}, ".prices.m.output: is missing"),
        (
            {"prices": {"m": {"input": 1, "output": 1, "cached": 1}}},
            ".prices.m.cached: unknown key; did you mean",
        ),
        ({"max_cost": 0}, ".max_cost: must be more than 0"),
        ({"purposes": {"x": {"confirm_above": -1}}}, ".purposes.x.confirm_above: must be at least 0"),
    ],
)
def test_mistakes_about_money(config: Any, problem: str) -> None:
    with pytest.raises(StartupError) as caught:
        parse_settings(config)
    assert str(caught.value).startswith(ROOT + problem)


def test_a_client_of_dask_stands_for_its_scheduler_and_security() -> None:
    client = SimpleNamespace(scheduler=SimpleNamespace(address="tls://h:1"), security="its own")
    workers = workers_from(client, timeout=5)
    assert workers is not None
    assert (workers.scheduler, workers.client_security, workers.timeout) == ("tls://h:1", "its own", 5)
