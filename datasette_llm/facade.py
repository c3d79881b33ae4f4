"""`LLM`: what other plugins call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import llm

from .access.keys import KeyRing, know_key
from .access.permissions import Plan, authorize, filter_by_hooks, get_plan, resolve_model_id
from .access.pricing_plugins import find_plugin_price
from .calls.choice import Choice
from .calls.loading import import_model_plugins, load_in_thread
from .calls.prices import find_pricing, in_batches
from .calls.workers import workers_from
from .models import WrappedAsyncModel, open_group
from .pace.policy import Patience

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from datasette.app import Datasette

    from .access.catalog import AnyAsyncModel
    from .models import GroupModel


class LLM:
    """Language models for a Datasette plugin: chosen, permitted, keyed and accounted for.

    Cheap to make, holds nothing; works on a Datasette whose startup never ran, on asyncio and trio.
    """

    def __init__(self, datasette: Datasette) -> None:
        self.datasette = datasette

    async def model(
        self, model_id: str | None = None, purpose: str | None = None, actor: dict[str, Any] | None = None
    ) -> WrappedAsyncModel:
        """Return a model to prompt.

        Args:
            model_id: an id or alias; else the default for the actor and purpose is used.
            purpose: what the prompts are for.
            actor: the Datasette actor they are for.

        Raises:
            ModelNotFoundError: there is no such model, none is configured, or this actor may not
                use it for this purpose.
        """
        return WrappedAsyncModel(self.datasette, await self._choose(model_id, purpose, actor))

    async def models(
        self, actor: dict[str, Any] | None = None, purpose: str | None = None
    ) -> list[AnyAsyncModel]:
        """Return llm's model objects that this actor may use for this purpose, the default first."""
        await import_model_plugins()
        plan = get_plan(self.datasette, purpose)
        ids = await filter_by_hooks(self.datasette, plan, purpose, actor)
        models = [plan.snapshot.get(model_id) for model_id in ids]
        if plan.settings.require_keys is False:
            return models
        ring = KeyRing(self.datasette, actor)
        return [model for model in models if await ring.can_call(model, plan.key_names(model.model_id))]

    def group(
        self,
        model_id: str | None = None,
        purpose: str | None = None,
        actor: dict[str, Any] | None = None,
        *,
        concurrency: int | None = None,
        on_error: Literal["collect", "cancel"] = "collect",
        wait_for_quota: float = 0.0,
        timeout: float | None = None,
        outage_timeout: float | Patience | None = None,
        workers: Any = None,
    ) -> AbstractAsyncContextManager[GroupModel]:
        """Return a context manager that owns all prompts of its model: ``async with llm.group() as model``.

        Args:
            model_id: as for `model`.
            purpose: as for `model`.
            actor: as for `model`.
            concurrency: how many prompts may be in flight; else as configured.
            on_error: ``"collect"`` lets the other prompts go on when one fails, ``"cancel"`` does not.
            wait_for_quota: how many seconds prompts wait for a quota that is used up to come back. By
                default, and when it takes longer, all of them fail at once, as after any failure that
                none of them can escape (no money, a wrong key, no such model): unsent.
            timeout: how many seconds one attempt may take; else as configured.
            outage_timeout: how many seconds prompts wait for a provider that cannot be reached, or refuses
                whatever is asked, together and without using up their attempts. By default each
                waits as long as ``retries`` allows.
            workers: who makes the model calls: a number of local processes that end with the group, the
                address of a Dask scheduler (``tls://host:8786``), a mapping of it and its ``security``, or a
                ``distributed.Client``; 0 is this process itself. Else as configured.

        Raises:
            ValueError: ``workers`` is none of these.
            WorkersError: on entry: they cannot be used, or have another version of llm or of the model.
            NoWorkers: on entry: there is none in time.
        """
        asked = workers_from(workers)
        if isinstance(outage_timeout, (int, float)):
            outage_timeout = Patience(outage_timeout, together=True)

        async def choose() -> Choice:
            choice = await self._choose(model_id, purpose, actor)
            if workers is not None:
                choice = replace(choice, workers=asked)
            if timeout is None:
                return choice
            return replace(choice, settings=replace(choice.settings, timeout=timeout))

        return open_group(
            self.datasette,
            choose=choose,
            concurrency=concurrency,
            on_error=on_error,
            wait_for_quota=wait_for_quota,
            patience=outage_timeout,
        )

    def _offline_group(
        self,
        model_id: str | None = None,
        purpose: str | None = None,
        actor: dict[str, Any] | None = None,
        *,
        concurrency: int = 4,
    ) -> AbstractAsyncContextManager[GroupModel]:
        """Return a context manager like that of `group`, of a group whose prompts are answered in batches."""
        from .calls.batches.offline import Offline

        async def choose() -> Choice:
            choice = await self._choose(model_id, purpose, actor)
            return replace(choice, batch=True, pricing=in_batches(choice.pricing))

        return open_group(self.datasette, choose=choose, concurrency=concurrency, offline=Offline())

    async def get_key_for_model(
        self, model: Any, actor: dict[str, Any] | None = None, purpose: str | None = None
    ) -> str | None:
        """Return the API key that prompts of a model (object, id or alias) would use, if there is one."""
        plan = get_plan(self.datasette, purpose)
        model = self._model_object(plan, model)
        return await KeyRing(self.datasette, actor).key_for(model, plan.key_names(model.model_id))

    async def model_has_key(
        self, model: Any, actor: dict[str, Any] | None = None, purpose: str | None = None
    ) -> bool:
        """Say whether a model (object, id or alias) can be called: it needs no key, or has one."""
        plan = get_plan(self.datasette, purpose)
        model = self._model_object(plan, model)
        return await KeyRing(self.datasette, actor).can_call(model, plan.key_names(model.model_id))

    def _model_object(self, plan: Plan, model: Any) -> Any:
        if isinstance(model, (llm.AsyncModel, llm.AsyncKeyModel, llm.Model, llm.KeyModel)):
            return model
        return plan.snapshot.get(getattr(model, "model_id", model))

    async def _choose(
        self, model_id: str | None, purpose: str | None, actor: dict[str, Any] | None
    ) -> Choice:
        await import_model_plugins()
        plan = get_plan(self.datasette, purpose)
        chosen = await resolve_model_id(self.datasette, plan, model_id, purpose, actor)
        model = await authorize(self.datasette, plan, chosen, purpose, actor)
        key, key_name = await KeyRing(self.datasette, actor).find(model, plan.key_names(chosen))
        if key is not None and (not isinstance(model, llm.AsyncKeyModel) or model.key is not None):
            # Models of the older kind read their own attribute; and llm prefers it to the key of a call.
            model.key = key if not isinstance(model, llm.AsyncKeyModel) else None
        if key is not None:
            know_key(model, key)
        await load_in_thread(model)
        return Choice(
            model=model,
            model_id=chosen,
            key=key,
            options=plan.options(chosen),
            purpose=purpose,
            actor=actor,
            settings=plan.prompt_settings(chosen),
            pricing=plan.price(chosen)
            or await find_plugin_price(self.datasette, chosen)
            or await find_pricing(model),
            key_name=key_name,
            workers=plan.settings.workers_of(purpose),
        )

    async def _resolve_model_id(
        self, model_id: str | None = None, purpose: str | None = None, actor: dict[str, Any] | None = None
    ) -> str:
        """Return the id that `model` would use, without asking whether it may; plugins call this."""
        return await resolve_model_id(
            self.datasette, get_plan(self.datasette, purpose), model_id, purpose, actor
        )

    def _get_purpose_key_for_model(self, model_id: str, purpose: str | None) -> str | None:
        """Return the name of the secret that a purpose's section gives a model; plugins call this."""
        return get_plan(self.datasette, purpose).purpose_key(model_id)
