"""Metrics for whoever measures Datasette with OpenTelemetry: of model calls, and of lanes.

An operation of ``gen_ai.client.operation.duration`` is one model call: a prompt that is tried again is
several, each with its own end. What is waited for here, for a slot or a pause to be over, is no part of it.
Without a metrics SDK nothing is recorded, and nobody asks for the gauges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry import metrics
from opentelemetry.metrics import Observation

from ..pace.registry import throttles_everywhere
from ..pace.state import state_of
from .semantics import of_answer, of_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import llm
    from opentelemetry.metrics import CallbackOptions, Histogram, Meter

    from ..pace.state import LaneState
    from .choice import Choice
    from .semantics import Attributes

#: The conventions' boundaries of the histograms' buckets, in seconds and in tokens.
SECONDS = [0.01 * 2**power for power in range(14)]
TOKENS = [4**power for power in range(14)]


def is_measured() -> bool:
    """Whether anybody collects metrics. OpenTelemetry looks into the environment for that."""
    # The class that stands for a provider which may still come is not public.
    return not type(metrics.get_meter_provider()).__name__.startswith(("_Proxy", "NoOp"))


class Instruments:
    """All that is measured, with one meter."""

    def __init__(self, meter: Meter) -> None:
        self.duration = _histogram(
            meter, "gen_ai.client.operation.duration", "s", "GenAI operation duration.", SECONDS
        )
        self.first_chunk = _histogram(
            meter,
            "gen_ai.client.operation.time_to_first_chunk",
            "s",
            "Time from the request to the first chunk of a streamed answer.",
            SECONDS,
        )
        self.tokens = _histogram(
            meter, "gen_ai.client.token.usage", "{token}", "Number of input and output tokens used.", TOKENS
        )
        self.cost = meter.create_counter(
            "datasette_llm.cost", unit="{USD}", description="What answers cost, where their price is known."
        )
        gauges: dict[str, tuple[str, str, Callable[[LaneState], float]]] = {
            "limit": ("{request}", "Model calls that may be in flight at once now.", lambda s: s.limit),
            "in_flight": ("{request}", "Model calls in flight.", lambda s: s.in_flight),
            "waiting": ("{request}", "Model calls that wait for their turn.", lambda s: s.waiting),
            "cooldown": ("s", "How long a refusal still keeps all waiting.", lambda s: s.cooldown_seconds),
            "away": ("1", "1 while the provider cannot be reached, else 0.", lambda s: s.away is not None),
        }
        for name, (unit, description, read) in gauges.items():
            meter.create_observable_gauge(
                f"datasette_llm.lane.{name}", callbacks=[_reader(read)], unit=unit, description=description
            )


def _histogram(meter: Meter, name: str, unit: str, description: str, boundaries: list[Any]) -> Histogram:
    try:
        return meter.create_histogram(
            name, unit=unit, description=description, explicit_bucket_boundaries_advisory=boundaries
        )
    except TypeError:  # An older OpenTelemetry knows only the boundaries that a view gives.
        return meter.create_histogram(name, unit=unit, description=description)


def _reader(read: Callable[[LaneState], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(options: CallbackOptions) -> Iterable[Observation]:
        # Two event loops may have the same lane; who looks at a gauge means both.
        values: dict[tuple[str, str], float] = {}
        for throttle in throttles_everywhere():
            lane = (throttle.model_id, throttle.key_name or "")
            values[lane] = values.get(lane, 0) + read(state_of(throttle))
        for (model_id, key_name), value in values.items():
            yield Observation(value, {"gen_ai.request.model": model_id, "datasette_llm.key_name": key_name})

    return observe


_instruments = Instruments(metrics.get_meter("datasette_llm"))


def record_call(choice: Choice, seconds: float, first_chunk_seconds: float | None, error: str | None) -> None:
    """Record one model call that has ended.

    Args:
        choice: what was asked, and for whom.
        seconds: how long the call took.
        first_chunk_seconds: how long its first chunk took, if it was streamed.
        error: what the error is called that it ended with, if it did.
    """
    attributes = of_request(choice)
    if first_chunk_seconds is not None:
        _instruments.first_chunk.record(first_chunk_seconds, attributes)
    if error is not None:
        attributes["error.type"] = error
    _instruments.duration.record(seconds, attributes)


def record_usage(choice: Choice, observed: llm.AsyncResponse, cost: float | None) -> None:
    """Record what an answer has used, as far as that is known."""
    answer = of_answer(observed)
    attributes: Attributes = of_request(choice)
    if "gen_ai.response.model" in answer:
        attributes["gen_ai.response.model"] = answer["gen_ai.response.model"]
    for kind in ("input", "output"):
        tokens = answer.get(f"gen_ai.usage.{kind}_tokens")
        if isinstance(tokens, int):
            _instruments.tokens.record(tokens, {**attributes, "gen_ai.token.type": kind})
    if cost:
        _instruments.cost.add(cost, attributes)
