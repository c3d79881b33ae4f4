"""Who may use which model: defaults, allow and block lists, and the hooks that decide with them.

A `Plan` is what the configuration says about one purpose, worked out against the installed models:
which are allowed and in what order, which is the default, whose keys and options to use. It is kept
until the configuration or the installed models change, so that a lookup is a few dictionary reads.

What an actor may use is decided in this order, and each step only takes away:

1. Blocked models, global and of the purpose, are out, even if one is a default.
2. With an allowlist only its models are left. That of a purpose is its ``model``, its ``models``
   and, unless it is ``exclusive``, the global list; the global list is ``default_model`` and ``models``.
3. What any ``llm_filter_models`` hook leaves out is out.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..backends import datasette_side
from ..calls.prices import Price
from ..errors import ModelNotFoundError
from ..hookspecs import plugin_manager
from .catalog import AnyAsyncModel, Snapshot, get_snapshot
from .sections import ROOT, PluginSettings
from .settings import get_settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from datasette.app import Datasette

    from ..pace.policy import PromptSettings

Actor = dict[str, Any] | None


class Plan:
    """What the configuration says about one purpose, given the installed models.

    Attributes:
        settings: the whole configuration.
        snapshot: the installed models.
        default: the configured default model, as it is written there.
        ids: the ids of the models that are available, in the order in which to offer them.
    """

    def __init__(self, settings: PluginSettings, snapshot: Snapshot, purpose: str | None) -> None:
        self.settings = settings
        self.snapshot = snapshot
        self._purpose = purpose
        self._prompt_settings: dict[str, PromptSettings] = {}
        section = settings.purpose(purpose)
        general = [settings.default_model] if settings.default_model is not None else []
        own = [reference for _, reference in section.references()] if section is not None else []

        # Least specific first, so that the later ones win; keys are read the other way round.
        self._options: dict[str, dict[str, Any]] = {}
        for reference in [*general, *reversed(own)]:
            if reference.options:
                self._options.setdefault(self._id(reference.model), {}).update(reference.options)
        self._key_names: dict[str, list[str]] = {}
        self._purpose_keys: dict[str, str] = {}
        # A key beside an entry of the list is about that model; one beside the default, about the purpose.
        for reference in sorted(own, key=lambda reference: reference is (section and section.model)):
            if reference.key:
                self._purpose_keys.setdefault(self._id(reference.model), reference.key)
                self._key_names.setdefault(self._id(reference.model), []).append(reference.key)
        for reference in general:
            if reference.key:
                self._key_names.setdefault(self._id(reference.model), []).append(reference.key)

        default = (section and section.model) or settings.default_model
        self.default: str | None = default.model if default is not None else None
        self.ids = self._available([r.model for r in own], [r.model for r in general])
        self._permitted = frozenset(self.ids)

    def _available(self, own: list[str], general: list[str]) -> tuple[str, ...]:
        """Apply the lists of the configuration to the installed models, in the order to offer them."""
        settings, section, installed = self.settings, self.settings.purpose(self._purpose), self.snapshot.ids
        listed, blocked = settings.models, list(settings.blocked_models or ())
        allowed: Iterable[str] = installed
        if section is not None:
            blocked += section.blocked_models or ()
        if section is not None and section.exclusive:
            allowed = own
        elif listed is not None:
            allowed = [*own, *general, *listed]
        elif section is not None and section.models is not None:
            allowed = own
        permitted = set(map(self._id, allowed)) - set(map(self._id, blocked))
        default = [self.default] if self.default is not None else []
        order = dict.fromkeys(map(self._id, [*default, *own, *(listed or ()), *general, *installed]))
        return tuple(name for name in order if name in permitted and name in self.snapshot.for_hooks)

    def _id(self, name: str) -> str:
        return self.snapshot.resolve(name) or name

    def permits(self, model_id: str) -> bool:
        """Say whether the configuration lets this purpose use a model."""
        return model_id in self._permitted

    def key_names(self, model_id: str) -> list[str]:
        """Return the names of the secrets to try for a model, best first."""
        return self._key_names.get(model_id, [])

    def purpose_key(self, model_id: str) -> str | None:
        """Return the name of the secret that the purpose's own section gives a model."""
        return self._purpose_keys.get(self._id(model_id))

    def options(self, model_id: str) -> Mapping[str, Any]:
        """Return the default options for a model."""
        return self._options.get(model_id, {})

    def prompt_settings(self, model_id: str) -> PromptSettings:
        """Return concurrency, timeout, retries and rate limit for a model."""
        settings = self._prompt_settings.get(model_id)
        if settings is None:
            limits = {self._id(name): limit for name, limit in (self.settings.rate_limits or {}).items()}
            settings = self.settings.prompt_settings(self._purpose, limits.get(model_id))
            self._prompt_settings[model_id] = settings
        return settings

    def price(self, model_id: str) -> Price | None:
        """Return the configured price of a model."""
        for name, price in (self.settings.prices or {}).items():
            if price is not None and self._id(name) == model_id:
                return Price(price.input, price.output, price.cached_input, price.batch)
        return None


_plans: WeakKeyDictionary[Datasette, tuple[PluginSettings, Snapshot, dict[str | None, Plan]]]
_plans = WeakKeyDictionary()


def get_plan(datasette: Datasette, purpose: str | None) -> Plan:
    """Return what the configuration says about a purpose.

    Raises:
        StartupError: the configuration is wrong; see `settings.parse_settings`.
    """
    settings, snapshot = get_settings(datasette), get_snapshot()
    known = _plans.get(datasette)
    if known is None or known[0] is not settings or known[1] is not snapshot:
        known = _plans[datasette] = (settings, snapshot, {})
    plans = known[2]
    # Purposes that the configuration does not mention share one plan: their names are anybody's.
    name = purpose if settings.is_configured(purpose) else None
    plan = plans.get(name)
    if plan is None:
        plan = plans[name] = Plan(settings, snapshot, name)
    return plan


async def resolve_model_id(
    datasette: Datasette, plan: Plan, model_id: str | None, purpose: str | None, actor: Actor
) -> str:
    """Return the id of the model asked for, or of the default: the first hook's answer, else configured.

    Aliases are resolved; an id that is not installed is returned as it is.

    Raises:
        ModelNotFoundError: nothing was asked for and there is no default.
    """
    name = model_id or await _hook_default(datasette, purpose, actor) or plan.default
    if name is None:
        place = f"{ROOT}.purposes.{purpose}.model or " if purpose else ""
        raise ModelNotFoundError(
            f"No model was asked for and no default is configured: set {place}{ROOT}.default_model"
        )
    if not isinstance(name, str):
        raise TypeError(f"A model id is text, not {type(name).__name__}")
    return plan.snapshot.resolve(name) or name


async def authorize(
    datasette: Datasette, plan: Plan, model_id: str, purpose: str | None, actor: Actor
) -> AnyAsyncModel:
    """Return the caller's own copy of a model, if this actor may use it for this purpose.

    Raises:
        ModelNotFoundError: it is not installed, or the configuration or a hook excludes it.
    """
    model = plan.snapshot.get(model_id)
    enforce = plan.settings.enforce or "all"
    if enforce != "none":
        if not plan.permits(model_id):
            raise _refused(model_id, purpose, f"the configuration ({ROOT}) excludes it")
        if enforce == "all" and model_id not in await filter_by_hooks(datasette, plan, purpose, actor):
            raise _refused(model_id, purpose, "a plugin excludes it for this actor and purpose")
    return model


def _refused(model_id: str, purpose: str | None, why: str) -> ModelNotFoundError:
    place = f" for the purpose {purpose!r}" if purpose else ""
    return ModelNotFoundError(f"The model {model_id!r} is not available{place}: {why}")


# A filter hook that itself asks this package for a model (to judge the actor, say) would be asked again.
_filtering: ContextVar[bool] = ContextVar("datasette_llm_filtering", default=False)


async def filter_by_hooks(datasette: Datasette, plan: Plan, purpose: str | None, actor: Actor) -> Any:
    """Return the ids, in order, that every ``llm_filter_models`` hook lets this actor use."""
    caller = plugin_manager().hook.llm_filter_models
    if _filtering.get() or not caller.get_hookimpls():
        return plan.ids
    return await datasette_side.call(_ask_filters, caller, datasette, plan, purpose, actor)


async def _ask_filters(
    caller: Any, datasette: Datasette, plan: Plan, purpose: str | None, actor: Actor
) -> tuple[str, ...]:
    models = [plan.snapshot.for_hooks[model_id] for model_id in plan.ids]
    token = _filtering.set(True)
    answers: list[Any] = []
    try:
        answers = caller(datasette=datasette, models=models, actor=actor, purpose=purpose)
        ids = plan.ids
        while answers:
            answer = answers.pop(0)
            if inspect.isawaitable(answer):
                answer = await answer
            if answer is not None:
                kept = _ids_of(answer)
                ids = tuple(model_id for model_id in ids if model_id in kept)
    finally:
        _filtering.reset(token)
        _close(answers)
    return ids


def _ids_of(answer: Any) -> set[Any]:
    if isinstance(answer, (str, dict)) or not hasattr(answer, "__iter__"):
        raise TypeError(
            f"An llm_filter_models hook returned {type(answer).__name__} instead of a list of models or None"
        )
    return {getattr(model, "model_id", model) for model in answer}


async def _hook_default(datasette: Datasette, purpose: str | None, actor: Actor) -> str | None:
    caller = plugin_manager().hook.llm_default_model
    if not caller.get_hookimpls():
        return None
    name: str | None = await datasette_side.call(_ask_defaults, caller, datasette, purpose, actor)
    return name


async def _ask_defaults(caller: Any, datasette: Datasette, purpose: str | None, actor: Actor) -> Any:
    answers = caller(datasette=datasette, purpose=purpose, actor=actor)
    try:
        while answers:
            answer = answers.pop(0)
            if inspect.isawaitable(answer):
                answer = await answer
            if answer is not None:
                return answer
    finally:
        _close(answers)
    return None


def _close(answers: list[Any]) -> None:
    """Dispose of the coroutines that nobody is going to await."""
    for answer in answers:
        if inspect.iscoroutine(answer):
            answer.close()
