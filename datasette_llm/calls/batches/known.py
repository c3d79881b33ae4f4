"""Which provider's batches a model's requests can travel in, told by a request itself."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .anthropic import ENDING as MESSAGES
from .anthropic import AnthropicBatches
from .gemini import GeminiBatches
from .http import Endpoint
from .openai import ENDINGS, OpenAIBatches
from .protocol import NoBatchesError

if TYPE_CHECKING:
    from .offline import Request
    from .protocol import BatchProtocol

_GEMINI = re.compile(r"/(models/[^/:]+):(?:stream)?[gG]enerateContent$")


def batches_of(request: Request) -> tuple[BatchProtocol, Endpoint]:
    """Return the protocol for a request that was recorded, and the endpoint that it speaks to.

    The endpoint is the caller's to close.

    Raises:
        NoBatchesError: there is none.
    """
    path = urlsplit(request.url).path
    for ending in ENDINGS:
        if path.endswith(ending):
            endpoint = Endpoint(request, ending)
            return OpenAIBatches(endpoint, ending), endpoint
    if path.endswith(MESSAGES):
        endpoint = Endpoint(request, MESSAGES)
        return AnthropicBatches(endpoint), endpoint
    found = _GEMINI.search(path)
    if found is not None:
        endpoint = Endpoint(request, found[0])
        return GeminiBatches(endpoint, found[1]), endpoint
    raise NoBatchesError(f"requests to {path} cannot be sent in batches")
