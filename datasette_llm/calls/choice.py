"""What was decided before a prompt runs: the model, its key and how to run it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..pace.policy import PromptSettings
from ..secrecy import keep_secret

if TYPE_CHECKING:
    from collections.abc import Mapping

    import llm

    from .prices import Pricing
    from .workers import Workers


@dataclass(frozen=True)
class Choice:
    """The answer to "which model, key and options for this purpose and actor".

    Attributes:
        model: a shallow copy of llm's model object that nobody else holds.
        model_id: the model's own id, never an alias.
        key: the API key to send, or ``None`` to leave it to llm; not shown in the repr.
        options: configured defaults for ``prompt()``; options given to a call win.
        purpose: what the prompts are for.
        actor: the Datasette actor they are for.
        settings: concurrency, timeout, retries and rate limits.
        pricing: what its tokens cost, if anybody knows.
        batch: its prompts are answered in batches.
        key_name: where the key comes from, in words.
        workers: who makes the model calls of a group, if not this process.
    """

    model: llm.AsyncModel | llm.AsyncKeyModel
    model_id: str
    key: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    purpose: str | None = None
    actor: dict[str, Any] | None = None
    settings: PromptSettings = field(default_factory=PromptSettings)
    pricing: Pricing | None = None
    batch: bool = False
    key_name: str | None = None
    workers: Workers | None = None

    def __post_init__(self) -> None:
        keep_secret(self.key)
