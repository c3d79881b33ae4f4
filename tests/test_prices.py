"""What answers cost: who says so, in which order, and what is counted as the provider bills it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from datasette.app import Datasette
from datasette.plugins import pm

from datasette_llm import LLM
from datasette_llm.access.pricing_plugins import find_plugin_price
from datasette_llm.calls.prices import Price, Usage, find_pricing, told_in_headers, usage_of
from datasette_llm.enrich import EnrichInputError, enrich
from datasette_llm.enrich.telling.words import dollars

from .enrich_tables import TableFile
from .fakes import FakeModel, registered

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

OURS: dict[str, Any] = {"prices": {"fake": {"input": 1_000_000, "output": 2_000_000}}}
PRICES = {"plugins": {"datasette-llm": OURS}}


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({}, Usage(100, 20)),
        ({"prompt_tokens_details": {"cached_tokens": 60}}, Usage(100, 20, 60)),
        ({"input_tokens_details": {"cached_tokens": 60}}, Usage(100, 20, 60)),
        ({"cachedContentTokenCount": 60, "thoughtsTokenCount": 5}, Usage(100, 20, 60)),
        ({"prompt_cache_hit_tokens": 60}, Usage(100, 20, 60)),
        ({"cache_read_input_tokens": 60, "cache_creation_input_tokens": 7}, Usage(167, 20, 60, 7)),
        ({"completion_tokens_details": {"reasoning_tokens": 15}}, Usage(100, 20)),
    ],
)
def test_tokens_are_counted_as_each_provider_bills_them(details: dict[str, Any], expected: Usage) -> None:
    assert usage_of(100, 20, details) == expected


def test_a_configured_price_is_for_a_million_tokens() -> None:
    assert Price(2.0, 8.0).cost(Usage(1_000_000, 500_000)) == 6.0
    assert Price(2.0, 8.0).cost(Usage(1_000_000, 0, 400_000)) == 2.0
    assert Price(2.0, 8.0, 0.5).cost(Usage(1_000_000, 0, 400_000)) == pytest.approx(1.4)


def test_a_model_that_does_not_count_its_tokens_costs_nobody_knows_what() -> None:
    assert usage_of(None, None, {}) is None


@pytest.mark.parametrize(
    ("value", "cost"), [("0.0012", 0.0012), ("0.0", None), ("", None), ("nan", None), ("-1", None)]
)
def test_the_header_of_a_proxy(value: str, cost: float | None) -> None:
    assert told_in_headers({"x-litellm-response-cost": value}) == cost
    assert told_in_headers({}) is None


@pytest.mark.real_clock
async def test_listed_prices_are_those_of_the_provider_that_the_key_is_for() -> None:
    pytest.importorskip("genai_prices")

    class Model:
        needs_key: str | None = "openai"
        model_name = "gpt-4o-mini"
        model_id = "mini"
        api_base: str | None = None

    found = await find_pricing(Model())
    assert found is not None
    assert found.cost(Usage(1_000_000, 0)) == pytest.approx(0.15)
    local, free = Model(), Model()
    local.api_base, free.needs_key = "http://127.0.0.1:1/v1", None
    assert await find_pricing(local) is None
    assert await find_pricing(free) is None


class Paid(FakeModel):
    """Says how many tokens it took, and maybe what the provider wants for them."""

    details: dict[str, Any] | None = None

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[Any, None]:
        async for chunk in super().execute(prompt, stream, response, conversation):
            yield chunk
        response.set_usage(input=3, output=2, details=self.details)


@pytest.mark.real_clock
async def test_what_the_provider_says_beats_the_price_and_without_either_nothing_is_said() -> None:
    model = Paid()
    with registered(model):
        async with LLM(Datasette(config=PRICES)).group("fake") as group:
            await (await group.prompt("x")).text()
            assert group.stats.cost == 7.0
            model.details = {"cost": 0.25}
        async with LLM(Datasette(config=PRICES)).group("fake") as group:
            await (await group.prompt("x")).text()
            assert (group.stats.cost, group.stats.unpriced) == (0.25, 0)
        model.details = None
        async with LLM(Datasette()).group("fake") as group:
            await (await group.prompt("x")).text()
            assert (group.stats.cost, group.stats.unpriced) == (None, 1)


def rows(tmp_path: Any, number: int) -> TableFile:
    file = TableFile(tmp_path, "create table t (id integer primary key, body text)")
    file.run_many("insert into t values (?, ?)", [(i, f"row {i}") for i in range(1, number + 1)])
    return file


@pytest.mark.real_clock
async def test_max_cost_stops_before_it_is_passed_and_the_rest_is_for_the_next_run(tmp_path: Any) -> None:
    file = rows(tmp_path, 20)
    with registered(Paid()):
        report = await enrich(
            file.datasette(config=PRICES),
            "data",
            "t",
            "{{ body }}",
            model="fake",
            column="answer",
            concurrency=1,
            max_cost=35,
        )
    assert (report.stopped, report.written, report.cost, report.remaining) == ("max_cost", 5, 35.0, 15)
    assert "the limit to the cost is reached" in report.summary()
    assert "$35.00" in report.summary()
    assert report.as_dict()["cost"] == 35.0
    assert file.run("select cost, outcome from _llm_runs") == [(35.0, "max_cost")]


@pytest.mark.real_clock
async def test_max_cost_of_a_model_without_a_price_is_refused_before_anything_is_sent(tmp_path: Any) -> None:
    file = rows(tmp_path, 3)
    model = Paid()
    with registered(model), pytest.raises(EnrichInputError, match="No price is known for 'fake'"):
        await file.enrich("t", "{{ body }}", column="answer", max_cost=1)
    assert file.run("select name from pragma_table_info('t')") == [("id",), ("body",)]


@pytest.mark.real_clock
async def test_a_purpose_may_have_its_own_limit(tmp_path: Any) -> None:
    file = rows(tmp_path, 20)
    ours = {**OURS, "max_cost": 70, "purposes": {"cheap": {"max_cost": 14}}}
    config = {"plugins": {"datasette-llm": ours}}
    with registered(Paid()):
        report = await enrich(
            file.datasette(config=config),
            "data",
            "t",
            "{{ body }}",
            model="fake",
            column="a",
            concurrency=1,
            purpose="cheap",
        )
        assert (report.stopped, report.written) == ("max_cost", 2)
        report = await enrich(
            file.datasette(config=config), "data", "t", "{{ body }}", model="fake", column="a", concurrency=1
        )
    assert (report.stopped, report.written) == ("max_cost", 10)


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (12.345, "$12.35"),
        (0, "$0.00"),
        (0.0123, "$0.0123"),
        (0.345, "$0.3450"),
        (0.00002, "$0.000020"),
        (1e-9, "less than $0.000001"),
    ],
)
def test_money_for_people(cost: float, text: str) -> None:
    assert dollars(cost) == text


class _Provider:
    """Like one of datasette-llm-accountant's: nanocents for tokens; knows one model."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    async def supported_models(self) -> set[str]:
        return {"fake"}

    async def calculate_cost_from_response(self, model_id: str, usage: Any, response: Any) -> int:
        cost: int = usage.input * 300_000 + usage.output * 1_200_000 + self.steps
        return cost


@pytest.mark.parametrize(("steps", "known"), [(0, True), (10**12, False)])
async def test_a_pricing_plugin_is_asked_before_the_list(
    steps: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hook:
        def get_hookimpls(self) -> list[int]:
            return [1]

        def __call__(self, datasette: Any) -> _Provider:
            return _Provider(steps)

    monkeypatch.setattr(pm, "hook", SimpleNamespace(register_llm_accountant_pricing=Hook()))
    price = await find_plugin_price(cast("Any", None), "fake")
    assert price == (Price(3.0, 12.0) if known else None)
    assert await find_plugin_price(cast("Any", None), "other") is None


async def test_a_pricing_plugin_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hook:
        def get_hookimpls(self) -> list[int]:
            return [1]

        def __call__(self, datasette: Any) -> Any:
            raise LookupError("its list cannot be read")

    monkeypatch.setattr(pm, "hook", SimpleNamespace(register_llm_accountant_pricing=Hook()))
    assert await find_plugin_price(cast("Any", None), "fake") is None
