"""Metrics for whoever measures Datasette: what calls took, used and cost, and how lanes stand."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from opentelemetry import metrics as api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from datasette_llm import LLM
from datasette_llm.calls import metrics
from datasette_llm.pace.policy import PromptSettings
from datasette_llm.pace.registry import get_throttle, throttles_everywhere
from tests.fakes import FakeModel, registered
from tests.hooks import datasette_with

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from datasette_llm.pace.throttle import Throttle


class Figures:
    """What a provider of this test's own has collected."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        self._reader = reader

    def read(self) -> dict[str, list[tuple[dict[str, Any], Any]]]:
        """Return the points of each metric: their attributes, and what they came to."""
        found = {}
        data = self._reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    found[metric.name] = [(dict(p.attributes or {}), p) for p in metric.data.data_points]
        return found


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[Figures]:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(api, "get_meter_provider", lambda: provider)
    monkeypatch.setattr(metrics, "_instruments", metrics.Instruments(provider.get_meter("test")))
    yield Figures(reader)
    provider.shutdown()


class RefusedError(Exception):
    status_code = 429


WHO = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "tests",
    "gen_ai.request.model": "fake",
    "datasette_llm.purpose": "testing",
}


async def test_calls_are_measured_one_by_one_and_what_they_used(figures: Figures) -> None:
    refusals = 1

    async def script(prompt: str) -> AsyncGenerator[Any, None]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise RefusedError
        yield "answer"

    datasette = datasette_with({"prices": {"fake": {"input": 1_000_000, "output": 0}}})
    with registered(FakeModel(script, seconds=2.0)):
        async with LLM(datasette).group("fake", purpose="testing") as model:
            await (await model.prompt("one two")).text()
            async for _ in model.map(["three"]):
                pass
    read = figures.read()
    durations = {who.get("error.type"): point for who, point in read["gen_ai.client.operation.duration"]}
    assert set(durations) == {
        None,
        "RefusedError",
    }
    # What is waited for between two attempts is no part of either.
    assert (durations[None].count, durations[None].sum) == (2, pytest.approx(4.0))
    if "explicit_bucket_boundaries_advisory" in inspect.signature(api.Meter.create_histogram).parameters:
        assert durations[None].explicit_bounds == tuple(metrics.SECONDS)
    ((who, first),) = read["gen_ai.client.operation.time_to_first_chunk"]
    assert who == WHO
    assert (first.count, first.sum) == (1, pytest.approx(2.0))
    tokens = {who["gen_ai.token.type"]: point for who, point in read["gen_ai.client.token.usage"]}
    assert (tokens["input"].count, tokens["input"].sum) == (2, 3)
    assert (tokens["output"].count, tokens["output"].sum) == (2, 2)
    ((who, cost),) = read["datasette_llm.cost"]
    assert who == WHO
    assert cost.value == 3.0


async def test_a_model_that_counts_no_tokens_has_no_usage(figures: Figures) -> None:
    class Silent(FakeModel):
        async def execute(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            yield "answer"

    with registered(Silent()):
        model = await LLM(datasette_with()).model("fake")
        await (await model.prompt("x")).text()
        await model.chain("y").text()
    read = figures.read()
    assert "gen_ai.client.token.usage" not in read
    assert sum(point.count for _, point in read["gen_ai.client.operation.duration"]) == 2


async def test_lanes_are_gauges_with_the_name_of_their_key_and_not_the_key(
    figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keyed(FakeModel):
        needs_key = "my-provider"
        key_env_var = "MY_PROVIDER_KEY"

    monkeypatch.setenv("MY_PROVIDER_KEY", "sk-1234567890abcdef")
    seen: list[dict[str, list[tuple[dict[str, Any], Any]]]] = []

    async def script(prompt: str) -> AsyncGenerator[Any, None]:
        seen.append(figures.read())
        yield "answer"

    with registered(Keyed(script, model_id="keyed")):
        async with LLM(datasette_with()).group("keyed", concurrency=3) as model:
            await (await model.prompt("x")).text()
    values = {name: points for name, points in seen[0].items() if name.startswith("datasette_llm.lane.")}
    lane = {
        "gen_ai.request.model": "keyed",
        "datasette_llm.key_name": "environment variable MY_PROVIDER_KEY",
    }
    figures_of = {
        name.rpartition(".")[2]: point.value for name in values for who, point in values[name] if who == lane
    }
    assert figures_of == {"limit": 3, "in_flight": 1, "waiting": 0, "cooldown": 0, "away": 0}
    assert "sk-1234" not in repr(values)


async def test_lanes_of_an_event_loop_that_has_ended_are_not_read() -> None:
    def other_loop() -> list[Throttle]:
        async def use() -> list[Throttle]:
            get_throttle("key", "elsewhere", PromptSettings())
            return throttles_everywhere()

        return anyio.run(use)

    def of_it(throttles: list[Throttle]) -> list[Throttle]:
        return [each for each in throttles if each.model_id == "elsewhere"]

    running = await anyio.to_thread.run_sync(other_loop)
    assert len(of_it(running)) == 1
    assert of_it(throttles_everywhere()) == []
