"""Which models and purposes there are, where the key of each comes from, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio.to_thread

from ...access.checks import problems
from ...access.keys import KeyNames, provider_secret
from ...access.permissions import get_plan, resolve_model_id
from ...access.purposes import listed_purposes
from ...access.settings import get_settings
from ...calls.clients.adoption import shares_clients
from ...calls.loading import import_model_plugins
from ...calls.semantics import provider_of
from ...errors import ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datasette.app import Datasette


async def read_models(datasette: Datasette, actor: dict[str, Any] | None) -> dict[str, Any]:
    """Return what there is, for an actor who may see the server's state.

    The models are those that the configuration allows, with or without a key. No secret is read for it.
    """
    await import_model_plugins()
    plan = get_plan(datasette, None)
    objects = [plan.snapshot.for_hooks[model_id] for model_id in plan.ids]
    shared = await anyio.to_thread.run_sync(_shared, {type(model): model for model in objects})
    names = KeyNames(datasette)
    models = []
    for model in objects:
        key = await _key(names, model, plan.key_names(model.model_id))
        models.append(
            {
                "model": model.model_id,
                "provider": provider_of(model),
                **key,
                "shared_clients": shared[type(model)],
            }
        )
    return {
        "models": models,
        "providers": _providers(models),
        "purposes": await _purposes(datasette, actor, names),
        "problems": problems(datasette),
    }


def _shared(examples: dict[type, Any]) -> dict[type, bool]:
    # Imports what the code of a model would import, so it runs in a thread.
    return {kind: shares_clients(model) for kind, model in examples.items()}


async def _key(names: KeyNames, model: Any, configured: list[str]) -> dict[str, Any]:
    source = await names.source(model, configured)
    needed = getattr(model, "needs_key", None) is not None
    missing = None if source or not needed else how_to_give_a_key(model, configured)
    return {"key": source, "needs_key": needed, "missing": missing}


def how_to_give_a_key(model: Any, configured: Iterable[str] = ()) -> str:
    """Return what to do for a model that has no key, in words."""
    needs_key = str(model.needs_key)
    secrets = " or ".join(dict.fromkeys([*configured, provider_secret(needs_key)]))
    ways = [f"set the secret {secrets}", f"run: llm keys set {needs_key}"]
    if variable := getattr(model, "key_env_var", None):
        ways.append(f"start the server with {variable}")
    return "no key: " + ", or ".join(ways)


def _providers(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put together models of one provider for which everything is the same."""
    alike: dict[tuple[Any, ...], dict[str, Any]] = {}
    for model in models:
        facts = ("provider", "key", "needs_key", "missing", "shared_clients")
        provider = alike.setdefault(
            tuple(model[fact] for fact in facts), {**{fact: model[fact] for fact in facts}, "models": []}
        )
        provider["models"].append(model["model"])
    return list(alike.values())


async def _purposes(
    datasette: Datasette, actor: dict[str, Any] | None, names: KeyNames
) -> list[dict[str, Any]]:
    described = {purpose.name: purpose.description for purpose in listed_purposes(datasette)}
    configured = get_settings(datasette).purposes or {}
    return [
        await _purpose(datasette, actor, names, name, described.get(name) or "")
        for name in dict.fromkeys([*described, *configured])
    ]


async def _purpose(
    datasette: Datasette, actor: dict[str, Any] | None, names: KeyNames, name: str, description: str
) -> dict[str, Any]:
    plan = get_plan(datasette, name)
    told: dict[str, Any] = {"purpose": name, "description": description, "model": None, "key": None}
    try:
        model_id = await resolve_model_id(datasette, plan, None, name, actor)
    except ModelNotFoundError:
        return {**told, "missing": "no model: set default_model, or the model of this purpose"}
    model = plan.snapshot.for_hooks.get(model_id)
    if model is None:
        return {**told, "model": model_id, "missing": str(plan.snapshot.not_found(model_id))}
    if not plan.permits(model_id):
        return {**told, "model": model_id, "missing": "the configuration excludes this model"}
    key = await _key(names, model, plan.key_names(model_id))
    return {**told, "model": model_id, "key": key["key"], "missing": key["missing"]}
