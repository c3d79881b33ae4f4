"""What Datasette's startup says about a configuration, beyond its form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datasette.utils import StartupError
from pydantic import ValidationError

from .catalog import get_snapshot
from .permissions import get_plan
from .sections import ROOT
from .settings import get_settings

if TYPE_CHECKING:
    from datasette.app import Datasette

    from .catalog import AnyAsyncModel


def problems(datasette: Datasette) -> list[str]:
    """Return a sentence for everything in the configuration that can't have its effect here."""
    return [*_unknown_models(datasette), *_unavailable_defaults(datasette)]


def default_models(datasette: Datasette) -> list[AnyAsyncModel]:
    """Return the models that are the default for something here, as far as they are installed."""
    settings, snapshot = get_settings(datasette), get_snapshot()
    names = [get_plan(datasette, purpose).default for purpose in [None, *(settings.purposes or {})]]
    ids = dict.fromkeys(snapshot.resolve(name) for name in names if name)
    return [snapshot.for_hooks[model_id] for model_id in ids if model_id is not None]


def check_options(datasette: Datasette) -> None:
    """Refuse options that a model would refuse at every single prompt.

    Raises:
        StartupError: naming each of them with its path.
    """
    snapshot, mistakes = get_snapshot(), []
    for path, reference in get_settings(datasette).references():
        model = snapshot.for_hooks.get(snapshot.resolve(reference.model) or "")
        if model is None or not reference.options:
            continue
        try:
            model.Options(**reference.options)
        except ValidationError as error:
            for details in error.errors(include_url=False, include_input=False):
                where = ".".join([ROOT, path, "options", *map(str, details["loc"])])
                problem = details["msg"]
                if details["type"] == "extra_forbidden":
                    problem = f"{reference.model} has no such option"
                    if known := sorted(model.Options.model_fields):
                        problem += f"; it has {', '.join(known)}"
                mistakes.append(f"{where}: {problem}")
    if mistakes:
        raise StartupError("\n".join(mistakes))


def _unknown_models(datasette: Datasette) -> list[str]:
    snapshot = get_snapshot()
    return [
        f"{ROOT}.{path}: unknown model {name!r}{snapshot.hint(name)}"
        for path, name in get_settings(datasette).model_names()
        if snapshot.resolve(name) is None
    ]


def _unavailable_defaults(datasette: Datasette) -> list[str]:
    settings, snapshot = get_settings(datasette), get_snapshot()
    problems = []
    for purpose in [None, *(settings.purposes or {})]:
        plan = get_plan(datasette, purpose)
        section = settings.purpose(purpose)
        model_id = snapshot.resolve(plan.default) if plan.default else None
        if (purpose is not None and section is None) or model_id is None or plan.permits(model_id):
            continue
        if section is not None and section.model is not None:
            problems.append(f"{ROOT}.purposes.{purpose}.model: {plan.default!r} is blocked")
        elif section is not None:
            problems.append(
                f"{ROOT}.purposes.{purpose}: default_model {plan.default!r} is blocked or not in the list; "
                f"without a model of its own this purpose has no default"
            )
        else:
            problems.append(f"{ROOT}.default_model: {plan.default!r} is blocked")
    return problems
