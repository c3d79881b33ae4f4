"""How prompts of one purpose and model are run: plain facts, read by throttle, retry and group."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ConcurrencyBounds:
    """An adaptive limit on the prompts in flight: where it starts, and between what it moves."""

    start: int = 20
    min: int = 1
    max: int = 500


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a transient failure is retried.

    Attributes:
        attempts: model calls per prompt, the first one included.
        timeout: seconds for all attempts of a prompt together, waits included.
    """

    attempts: int = 6
    timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long prompts wait for a provider that cannot be reached.

    Attributes:
        seconds: how long.
        together: for all prompts of their owner from the beginning of the outage on, which uses up none of
            their attempts or time; else for each from when it came, within its attempts.
        first_contact: seconds instead, while the provider has not answered anything yet.
    """

    seconds: float = 120.0
    together: bool = False
    first_contact: float = math.inf


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Fixed limits that the configuration gives; ``None`` is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """Everything that running a prompt depends on.

    Attributes:
        concurrency: a fixed number of prompts in flight, or the bounds of an adaptive one.
        timeout: seconds for one attempt, or ``None`` for the model plugin's own.
        retries: how long transient failures are retried.
        rate_limit: fixed limits from the configuration.
        outage_timeout: seconds that a job waits for a provider that cannot be reached.
        interactive: whether somebody waits for each answer; ``None`` is for prompts outside of groups.
    """

    concurrency: int | ConcurrencyBounds = field(default_factory=ConcurrencyBounds)
    timeout: float | None = None
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    rate_limit: RateLimit | None = None
    outage_timeout: float | None = None
    interactive: bool | None = None
