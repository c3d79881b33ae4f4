"""``workers`` in the configuration: a number of local processes, or a scheduler's mapping."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator

from ..calls.workers import Workers, workers_from
from .values import problem

#: For a purpose that makes its calls itself where others do not.
NONE = Workers(count=0)


def _workers(value: Any) -> Workers:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)  # ``$env`` gives text
    try:
        workers = workers_from(value)
    except ValueError as error:
        raise problem(str(error)) from None
    return NONE if workers is None else workers.kept()


ConfiguredWorkers = Annotated[Any, PlainValidator(_workers)]
