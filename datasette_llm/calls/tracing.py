"""Spans for whoever traces Datasette with OpenTelemetry: of each prompt, chain, turn and tool call.

The span of a prompt is current while wrappers, model call and callbacks run, so spans of theirs are its
children. A chain is the invocation of an agent, with the model calls and tools of its turns as children.
What they are called is in `semantics`. Without a tracing SDK nothing is made.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from ..responses.outcome import finish_reasons
from .prices import cost_of
from .semantics import error_type, name_of, of_answer, of_request, of_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    import llm

    from ..responses.response import PromptResponse
    from .choice import Choice

_tracer = trace.get_tracer("datasette_llm")
#: Stands for the span of a prompt where nobody collects spans.
no_span: AbstractContextManager[trace.Span | None] = nullcontext()


def is_traced() -> bool:
    """Whether anybody collects spans. OpenTelemetry looks into the environment for that."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@contextmanager
def prompt_span(choice: Choice) -> Iterator[trace.Span]:
    """Hold a span open around a model call and all that belongs to it."""
    with _tracer.start_as_current_span(
        f"chat {name_of(choice.model)}",
        kind=trace.SpanKind.CLIENT,
        attributes=of_request(choice),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


@contextmanager
def chain_span(choice: Choice) -> Iterator[trace.Span]:
    """Hold a span open around a chain of prompts and tools."""
    with _tracer.start_as_current_span(
        "invoke_agent",
        kind=trace.SpanKind.INTERNAL,
        attributes=of_request(choice, "invoke_agent"),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


@contextmanager
def turn_span(choice: Choice, response: PromptResponse) -> Iterator[None]:
    """Hold a span open around one model call of a chain, and describe its end."""
    with prompt_span(choice) as span:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
            raise
        finally:
            reasons = finish_reasons([response], failure)
            describe_end(span, failure, [response], reasons, cost_of(response, choice.pricing))
            del failure  # Its traceback holds this frame.


@contextmanager
def tool_span(call: llm.ToolCall) -> Iterator[Callable[[BaseException | None], None]]:
    """Hold a span open around a tool call; yields what is told its error.

    Its arguments and its result are nobody's business.
    """
    attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": call.name}
    attributes["gen_ai.tool.type"] = "function"
    if call.tool_call_id:
        attributes["gen_ai.tool.call.id"] = call.tool_call_id
    with _tracer.start_as_current_span(
        f"execute_tool {call.name}",
        kind=trace.SpanKind.INTERNAL,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield partial(describe_error, span)


def describe_error(span: trace.Span, error: BaseException | None) -> None:
    """Say that it ended with an error, by the name of its class."""
    if error is not None:
        span.set_attribute("error.type", error_type(error))
        span.set_status(Status(StatusCode.ERROR))


def describe_worker(address: str | None, deaths: int) -> None:
    """Say in the span that is current which worker made its call, and how many died over it."""
    span = trace.get_current_span()
    if address is not None:
        span.set_attribute("datasette_llm.worker", address)
    if deaths:
        span.set_attribute("datasette_llm.worker_deaths", deaths)


def describe_end(
    span: trace.Span,
    error: Exception | None,
    responses: Sequence[PromptResponse],
    finish_reasons: list[str],
    cost: float | None,
) -> None:
    """Say how it ended.

    Args:
        span: of a prompt, or of a chain.
        error: what it ended with, if that is an error.
        responses: the one of a prompt, or those of a chain.
        finish_reasons: why the model stopped each time.
        cost: what they cost in dollars, if that is known.
    """
    describe_error(span, error)
    told: dict[str, int] = {}
    for response in responses:
        observed = response._observed
        answer = of_answer(observed)
        for name, value in answer.items():
            if name.startswith("gen_ai.usage.") and isinstance(value, int):
                told[name] = told.get(name, 0) + value
        if len(responses) == 1:
            span.set_attributes({**of_settings(observed), **answer})
            if response._first_chunk_seconds is not None:
                span.set_attribute("gen_ai.response.time_to_first_chunk", response._first_chunk_seconds)
            if response.attempts > 1:
                span.set_attribute("datasette_llm.attempts", response.attempts)
    span.set_attributes(told)
    if finish_reasons:
        span.set_attribute("gen_ai.response.finish_reasons", finish_reasons)
    if cost is not None:
        span.set_attribute("datasette_llm.cost", cost)
