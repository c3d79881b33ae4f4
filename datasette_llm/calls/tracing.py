"""One span per prompt or chain, for whoever traces Datasette with OpenTelemetry.

The span is current while wrappers, model call and callbacks run, so spans of theirs are its children. It
carries OpenTelemetry's names for generative AI, the purpose, and nothing of what was said: no prompt, no
answer, no error message (which may quote a key). Without a tracing SDK nothing is made.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from .choice import Choice

_tracer = trace.get_tracer("datasette_llm")
#: Stands for the span of a prompt where nobody collects spans.
no_span: AbstractContextManager[trace.Span | None] = nullcontext()


def is_traced() -> bool:
    """Whether anybody collects spans. OpenTelemetry looks into the environment for that."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@contextmanager
def prompt_span(choice: Choice, operation: str) -> Iterator[trace.Span]:
    """Hold a span open around a prompt.

    Args:
        choice: the model and purpose to name.
        operation: ``chat`` for a prompt, ``chain`` for a chain of them.
    """
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": choice.model_id,
        "datasette_llm.purpose": choice.purpose or "",
    }
    with _tracer.start_as_current_span(
        f"{operation} {choice.model_id}",
        kind=trace.SpanKind.CLIENT,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def describe_end(
    span: trace.Span,
    error: Exception | None,
    input_tokens: int,
    output_tokens: int,
    finish_reasons: list[str],
    cost: float | None = None,
) -> None:
    """Say how it ended: the class of its error, the tokens and dollars, why its model stopped each time."""
    if error is not None:
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(Status(StatusCode.ERROR))
    span.set_attribute("gen_ai.usage.input_tokens", input_tokens)
    span.set_attribute("gen_ai.usage.output_tokens", output_tokens)
    if finish_reasons:
        span.set_attribute("gen_ai.response.finish_reasons", finish_reasons)
    if cost is not None:
        span.set_attribute("datasette_llm.cost", cost)
