"""The plugin's configuration: parsed once, checked completely, and never a guess.

`parse_settings` either returns `PluginSettings` or raises Datasette's StartupError with one line
per mistake: the dotted path, the problem and, for a typo, the nearest key. Values are never shown,
because any of them may be a secret. Whatever is ``null`` or absent has its default.

`get_settings` is what everybody calls: Datasette builds a new dict at every ``plugin_config()``
(and resolves ``$env`` in it), so what was parsed is kept, per Datasette, beside an equal dict.
"""

from __future__ import annotations

import copy
import difflib
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

from datasette.utils import StartupError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..pace.policy import ConcurrencyBounds, PromptSettings, RateLimit
from .configured_workers import ConfiguredWorkers  # noqa: TC001 - pydantic reads it

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from datasette.app import Datasette

    from ..calls.workers import Workers

PLUGIN_NAME = "datasette-llm"
ROOT = f"plugins.{PLUGIN_NAME}"

# A provider's key pasted where the name of a secret belongs would end up on the page of secrets.
LOOKS_LIKE_A_KEY = re.compile(r"(sk|pk|gsk|hf|r8)[-_][A-Za-z0-9_-]{16,}|AIza|xai-|Bearer ")
SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")

T = TypeVar("T")


def _problem(message: str) -> PydanticCustomError:
    # Braces would be read as placeholders of a template.
    return PydanticCustomError("datasette_llm", "{message}", {"message": message})


def _number(value: Any) -> Any:
    """Let numbers through, and their text (``$env`` gives text); true and false are no numbers."""
    if isinstance(value, bool):
        raise _problem("must be a number, not true or false")
    return value


def _truth(value: Any) -> Any:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _problem(f"must be true or false, not {_kind(value)}")
    return value


def _text(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise _problem("must be text, not a number: put it in quotes")
    if isinstance(value, str) and not value.strip():
        raise _problem("must not be empty")
    return value


def _secret_name(value: Any) -> Any:
    if isinstance(value, str) and (LOOKS_LIKE_A_KEY.match(value) or not SECRET_NAME.fullmatch(value)):
        raise _problem("must be the name of a secret, such as MY_OPENAI_KEY, not the key itself")
    return value


Whole = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Seconds = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Dollars = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Money = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Truth = Annotated[bool, BeforeValidator(_truth)]
Text = Annotated[str, BeforeValidator(_text)]
SecretName = Annotated[str, BeforeValidator(_secret_name), BeforeValidator(_text)]


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
            return {"model": _text(value)}
        if not isinstance(value, dict):
            message = f"must be a model id or a mapping with model, key and options, not {_kind(value)}"
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                message = "must be a model id, not a number: put it in quotes"
            raise _problem(message)
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
            raise _problem("min, start and max must be in that order")
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
            raise _problem("exclusive needs models (or model): it limits the purpose to its own list")
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


def parse_settings(config: Any) -> PluginSettings:
    """Check a plugin configuration.

    Raises:
        StartupError: naming every mistake with its path, and no value.
    """
    if config is None:
        return PluginSettings()
    try:
        return PluginSettings.model_validate(config)
    except ValidationError as error:
        # Not chained: pydantic's own message repeats the values, which may be secrets.
        lines = [_describe(dict(details)) for details in error.errors(include_url=False)]
    raise StartupError("\n".join(lines))


_parsed: WeakKeyDictionary[Datasette, tuple[Any, Any, PluginSettings]] = WeakKeyDictionary()


def get_settings(datasette: Datasette) -> PluginSettings:
    """Return the configuration of a Datasette, whether or not its startup ran.

    The same object as long as the configuration is equal.

    Raises:
        StartupError: see `parse_settings`.
    """
    known = _parsed.get(datasette)
    written = _written(datasette, PLUGIN_NAME)
    if known is not None and known[0] == written:
        return known[2]
    config = datasette.plugin_config(PLUGIN_NAME)
    if known is not None and known[1] == config:
        return known[2]
    settings = parse_settings(config)
    # What is written with $env or $file means something else once those change, so it equals nothing.
    _parsed[datasette] = (copy.deepcopy(written) if written == config else object(), config, settings)
    return settings


def plugin_config(datasette: Datasette, name: str) -> Any:
    """Return a plugin's configuration; at once if there is none, which is the usual case."""
    return datasette.plugin_config(name) if _written(datasette, name) is not None else None


def _written(datasette: Datasette, name: str) -> Any:
    """Return a plugin's configuration as it was written, which takes a tenth of the time.

    An object that is only like a Datasette may not have it; what is returned then equals nothing.
    """
    try:
        return ((datasette.config or {}).get("plugins") or {}).get(name)
    except AttributeError:
        return object()


# How a section is found on the way down a path, to suggest its nearest key.
_SECTIONS: Mapping[str, type[Section]] = {
    "default_model": ModelReference,
    "model": ModelReference,
    "models": ModelReference,
    "purposes": PurposeSettings,
    "concurrency": Bounds,
    "retries": Retries,
    "rate_limits": RateLimits,
    "prices": ModelPrice,
}


def _describe(details: Mapping[str, Any]) -> str:
    """Say where a mistake is and what would be right."""
    path = [part for part in details["loc"] if part not in (NUMBER, BOUNDS, "[key]")]
    kind, context = details["type"], details.get("ctx") or {}
    value = details.get("input")
    if kind == "extra_forbidden":
        problem = _unknown_key(path)
    elif kind == "missing":
        problem = "is missing"
    elif kind == "datasette_llm":
        problem = context["message"]
    elif kind == "literal_error":
        problem = f"must be {context['expected']}"
    elif kind == "greater_than_equal":
        problem = f"must be at least {context['ge']}"
    elif kind == "greater_than":
        problem = f"must be more than {context['gt']:g}"
    elif kind == "int_from_float":
        problem = "must be a whole number"
    elif kind == "finite_number":
        problem = "must be a finite number"
    else:
        expected = _EXPECTED.get(kind, "something else")
        if path and path[-1] in _AMOUNTS:
            expected = expected.replace("seconds", "dollars")
        problem = f"must be {expected}, not {_kind(value)}"
    return f"{'.'.join([ROOT, *map(str, path)])}: {problem}"


def _unknown_key(path: list[Any]) -> str:
    section: type[Section] = PluginSettings
    named = False  # whether the next part is a name that the configuration chose
    for part in path[:-1]:
        if not named and part in section.model_fields:
            section = _SECTIONS.get(str(part), section)
        named = part in ("purposes", "rate_limits", "prices") and not named
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(path[-1]), known, n=1)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    return f"unknown key; the keys here are {', '.join(known)}"


_AMOUNTS = {*ModelPrice.model_fields, "max_cost", "confirm_above"}

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number of seconds",
    "float_parsing": "a number of seconds",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def _kind(value: Any) -> str:
    for types, name in _KINDS:
        if isinstance(value, types):
            return name
    return f"a {type(value).__name__}"


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "nothing"),
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (dict, "a mapping"),
)
