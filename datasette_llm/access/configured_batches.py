"""``collect_batches`` in the configuration: whether a server collects batches, and how often it looks."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

#: Providers take minutes to hours; a look is one small request for each batch.
USUAL_SECONDS = 60.0

_WORDS = {"true": USUAL_SECONDS, "false": 0.0}


def _seconds(value: Any) -> float:
    if value is None or value is True:
        return USUAL_SECONDS
    if value is False:
        return 0.0
    if isinstance(value, str):  # ``$env`` gives text
        if value.lower() in _WORDS:
            return _WORDS[value.lower()]
        try:
            value = float(value)
        except ValueError:
            value = None
    if not isinstance(value, (int, float)) or not value >= 0 or not math.isfinite(value):
        message = "must be true, false or a number of seconds"
        raise PydanticCustomError("datasette_llm", "{message}", {"message": message})
    return float(value)


#: Seconds between two looks; 0 is never.
CollectBatches = Annotated[float, PlainValidator(_seconds)]
