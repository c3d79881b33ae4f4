"""What the configuration can say: its sections, their keys, and what they come to for a purpose.

What is ``null`` or absent has its default. Nothing here reads a configuration: `settings` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, model_validator

from ..pace.policy import ConcurrencyBounds, PromptSettings, RateLimit
from .configured_batches import USUAL_SECONDS, CollectBatches
from .configured_workers import ConfiguredWorkers  # noqa: TC001 - pydantic reads it
from .values import (
    Dollars,
    Money,
    Seconds,
    SecretName,
    Text,
    Truth,
    Whole,
    kind_of,
    problem,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..calls.workers import Workers

PLUGIN_NAME = "datasette-llm"
ROOT = f"plugins.{PLUGIN_NAME}"


class Section(BaseModel):
    """A mapping of the configuration; a key it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelReference(Section):
    """A model, maybe with its own key (the name of a secret) and default options."""

    model: Text
    key: SecretName | None = None
    options: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_id(cls, value: Any) -> Any:
        if isinstance(value, str):
            # Checked here, so that a mistake is reported where it was written.
            return {"model": text(value)}
        if not isinstance(value, dict):
            message = f"must be a model id or a mapping with model, key and options, not {kind_of(value)}"
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                message = "must be a model id, not a number: put it in quotes"
            raise problem(message)
        return value


class Bounds(Section):
    """Between what the adaptive concurrency moves."""

    start: Whole | None = None
    min: Whole | None = None
    max: Whole | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        values = [value for value in (self.min, self.start, self.max) if value is not None]
        if values != sorted(values):
            raise problem("min, start and max must be in that order")
        return self

    def bounds(self) -> ConcurrencyBounds:
        """Fill in what was left out, without contradicting what was given."""
        usual = ConcurrencyBounds()
        low = self.min or min(usual.min, self.start or usual.min)
        high = self.max or max(usual.max, self.start or 0, low)
        return ConcurrencyBounds(self.start or min(max(usual.start, low), high), min(low, high), high)


class Retries(Section):
    """For how long a transient failure is retried."""

    attempts: Whole | None = None
    timeout: Seconds | None = None


class RateLimits(Section):
    """What a provider allows, if it is to be set by hand."""

    requests_per_minute: Whole | None = None
    tokens_per_minute: Whole | None = None


class ModelPrice(Section):
    """Dollars per million tokens of a model; ``batch`` is the part of that which answers in batches cost."""

    input: Dollars
    output: Dollars
    cached_input: Dollars | None = None
    batch: Dollars | None = None


NUMBER, BOUNDS = "(number)", "(bounds)"
Concurrency = Annotated[
    Annotated[Whole, Tag(NUMBER)] | Annotated[Bounds, Tag(BOUNDS)],
    Discriminator(lambda value: BOUNDS if isinstance(value, (dict, Bounds)) else NUMBER),
]


class Pace(Section):
    """What can be set for everything, and again for one purpose."""

    concurrency: Concurrency | None = None
    timeout: Seconds | None = None
    outage_timeout: Seconds | None = None
    retries: Retries | None = None
    max_cost: Money | None = None
    confirm_above: Dollars | None = None
    workers: ConfiguredWorkers = None


class PurposeSettings(Pace):
    """``purposes.<name>``"""

    model: ModelReference | None = None
    models: list[ModelReference] | None = None
    blocked_models: list[Text] | None = None
    exclusive: Truth | None = None
    interactive: Truth | None = None

    @model_validator(mode="after")
    def _exclusive_to_something(self) -> PurposeSettings:
        if self.exclusive and self.models is None and self.model is None:
            raise problem("exclusive needs models (or model): it limits the purpose to its own list")
        return self

    def references(self) -> Iterator[tuple[str, ModelReference]]:
        """Every model this purpose names, with its path, the default first."""
        if self.model is not None:
            yield "model", self.model
        for index, reference in enumerate(self.models or ()):
            yield f"models.{index}", reference


class PluginSettings(Pace):
    """``plugins.datasette-llm``"""

    default_model: ModelReference | None = None
    purposes: dict[str, PurposeSettings | None] | None = None
    models: list[Text] | None = None
    blocked_models: list[Text] | None = None
    require_keys: Truth | None = None
    enforce: Literal["all", "config", "none"] | None = None
    rate_limits: dict[str, RateLimits | None] | None = None
    prices: dict[str, ModelPrice | None] | None = None
    collect_batches: CollectBatches = USUAL_SECONDS

    def purpose(self, name: str | None) -> PurposeSettings | None:
        """Return the section of a purpose, if it has one."""
        return (self.purposes or {}).get(name) if name is not None else None

    def is_configured(self, name: str | None) -> bool:
        """Say whether a purpose has a section that says anything."""
        return self.purpose(name) is not None

    def references(self) -> Iterator[tuple[str, ModelReference]]:
        """Every model reference of the configuration, with its path."""
        if self.default_model is not None:
            yield "default_model", self.default_model
        for name, section in (self.purposes or {}).items():
            if section is not None:
                for path, reference in section.references():
                    yield f"purposes.{name}.{path}", reference

    def model_names(self) -> Iterator[tuple[str, str]]:
        """Every place that names a model, as ``(path, id or alias)``."""
        for path, reference in self.references():
            yield path, reference.model
        lists: list[tuple[str, list[str] | None]] = [
            ("models", self.models),
            ("blocked_models", self.blocked_models),
        ]
        for name, section in (self.purposes or {}).items():
            if section is not None:
                lists.append((f"purposes.{name}.blocked_models", section.blocked_models))
        for path, names in lists:
            for index, model in enumerate(names or ()):
                yield f"{path}.{index}", model
        for model in self.rate_limits or ():
            yield f"rate_limits.{model}", model
        for model in self.prices or ():
            yield f"prices.{model}", model

    def money(self, purpose: str | None, name: Literal["max_cost", "confirm_above"]) -> float | None:
        """Return a limit in dollars: the purpose's own, else the general one, else ``None``."""
        section = self.purpose(purpose)
        own: float | None = None if section is None else getattr(section, name)
        general: float | None = getattr(self, name)
        return general if own is None else own

    def workers_of(self, purpose: str | None) -> Workers | None:
        """Return who makes the model calls of a purpose's groups; ``None`` is the process itself."""
        section = self.purpose(purpose)
        own: Workers | None = None if section is None else section.workers
        general: Workers | None = self.workers
        chosen = general if own is None else own
        return None if chosen is None or chosen.count == 0 else chosen

    @property
    def may_use_workers(self) -> bool:
        """Whether the groups of any purpose have workers."""
        return any(self.workers_of(purpose) is not None for purpose in (None, *(self.purposes or ())))

    def prompt_settings(self, purpose: str | None, rate_limit: RateLimits | None) -> PromptSettings:
        """Return how prompts of a purpose run: its own settings, else the general ones, else the defaults."""
        settings = PromptSettings()
        for section in (self, self.purpose(purpose)):
            if section is None:
                continue
            if isinstance(section.concurrency, Bounds):
                settings = replace(settings, concurrency=section.concurrency.bounds())
            elif section.concurrency is not None:
                settings = replace(settings, concurrency=section.concurrency)
            if section.timeout is not None:
                settings = replace(settings, timeout=section.timeout)
            if section.outage_timeout is not None:
                settings = replace(settings, outage_timeout=section.outage_timeout)
            if isinstance(section, PurposeSettings) and section.interactive is not None:
                settings = replace(settings, interactive=section.interactive)
            if section.retries is not None:
                given = section.retries.model_dump(exclude_none=True)
                settings = replace(settings, retries=replace(settings.retries, **given))
        if rate_limit is not None:
            limit = RateLimit(rate_limit.requests_per_minute, rate_limit.tokens_per_minute)
            settings = replace(settings, rate_limit=limit)
        return settings
