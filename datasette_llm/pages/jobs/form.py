"""The form of a job: what a person fills in, and everything that can be wrong with it before it starts.

Nothing that was typed is lost: a form that is sent comes back with it, and each mistake at its field.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...access.permissions import get_plan
from ...calls.prices import Usage, find_pricing
from ...enrich.answers.outputs import Outputs
from ...enrich.answers.schema import read_schema
from ...enrich.database import find_database, read
from ...enrich.errors import EnrichInputError
from ...enrich.reading.table import read_table
from ...enrich.reading.template import PromptTemplate
from ...enrich.spec import JobSpec
from ...errors import ModelNotFoundError
from ...facade import LLM
from ..columns import column_reference
from . import PURPOSE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...enrich.answers.outputs import Output
    from ...enrich.reading.table import Table
    from ..enrichments.visitor import Visitor

FIELDS = ("model", "prompt", "system", "column", "schema", "options", "limit", "max_cost", "overwrite")
MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Choice:
    """A model to choose.

    Attributes:
        price: in words; empty if none is known.
        schemas: it takes a schema.
    """

    model_id: str
    price: str
    schemas: bool


@dataclass(slots=True)
class Form:
    """A form as it is shown.

    Attributes:
        values: what is in its fields, as text.
        errors: what is wrong with them, by the field's name; under ``""`` what is wrong with all of it.
        outputs: the columns that receive the answers, once they are known.
    """

    table: Table
    models: list[Choice]
    values: dict[str, str]
    errors: dict[str, str] = field(default_factory=dict)
    outputs: tuple[Output, ...] = ()

    @property
    def references(self) -> list[tuple[str, str]]:
        """The columns, each with how a prompt shows it."""
        return [(column.name, column_reference(column.name)) for column in self.table.columns]

    @property
    def example(self) -> str:
        """A prompt about this table."""
        columns = self.table.columns
        texts = [each for each in columns if each.affinity == "TEXT" and not each.key_position]
        return f"Summarize: {column_reference((texts or list(columns))[-1].name)}"


async def open_form(
    datasette: Any, actor: dict[str, Any] | None, database: str, table: str, values: Mapping[str, str]
) -> Form:
    """Return a form with these values.

    Raises:
        EnrichInputError: there is no such table, or its rows cannot be enriched.
    """
    found = await read(find_database(datasette, database), partial(read_table, name=table))
    models = await _models(datasette, actor)
    form = Form(found, models, {name: str(values.get(name) or "") for name in FIELDS})
    for name in ("prompt", "system", "column", "schema", "options", "limit", "max_cost"):
        form.values[name] = form.values[name].replace("\r\n", "\n").strip()
    if not form.values["model"] and models:
        form.values["model"] = models[0].model_id
    return form


def values_of(spec: JobSpec, run: Mapping[str, Any]) -> dict[str, str]:
    """Return what somebody would have filled in to get this job."""
    import json

    schema = spec.schema if isinstance(spec.schema, str) else ""
    if spec.schema and not schema:
        schema = json.dumps(spec.schema, ensure_ascii=False)
    return {
        "model": spec.model or "",
        "prompt": spec.prompt,
        "system": spec.system or "",
        # One without a schema has a column in any case.
        "column": spec.column or ("" if spec.schema else run["columns"][0]),
        "schema": schema,
        "options": "\n".join(f"{name} {value}" for name, value in spec.options.items()),
        "limit": str(spec.limit or ""),
        "max_cost": "" if spec.max_cost is None else f"{spec.max_cost:g}",
        "overwrite": "1" if spec.overwrite else "",
    }


async def check(
    form: Form,
    datasette: Any,
    actor: dict[str, Any] | None,
    database: str,
    where: str | None,
    visitor: Visitor,
) -> JobSpec | None:
    """Return the job that a form asks for, or ``None`` and say in the form what is wrong with it."""
    values, errors = form.values, form.errors
    schema = None
    if not values["prompt"]:
        errors["prompt"] = "Write what to ask about each row."
    else:
        _try(errors, "prompt", partial(PromptTemplate, values["prompt"], form.table.column_names))
    if values["schema"]:
        schema = _try(errors, "schema", partial(read_schema, values["schema"]))
    if "schema" not in errors:
        _check_outputs(form, schema, visitor)
    spec = JobSpec(
        database=database,
        table=form.table.name,
        prompt=values["prompt"],
        column=values["column"] or None,
        model=values["model"] or None,
        purpose=PURPOSE,
        actor=actor,
        system=values["system"] or None,
        schema=values["schema"] or None,
        options=_options(values["options"], errors),
        where=where,
        limit=_number(values["limit"], "limit", errors, int),
        max_cost=_number(values["max_cost"], "max_cost", errors, float),
        overwrite=bool(values["overwrite"]),
    )
    await _check_model(form, datasette, spec, schema)
    return None if errors else spec


def _check_outputs(form: Form, schema: dict[str, Any] | None, visitor: Visitor) -> None:
    name = form.values["column"] or None
    at = "schema" if name is None and schema is not None else "column"
    outputs = _try(form.errors, at, partial(Outputs, form.table, name, schema))
    if outputs is None:
        return
    form.outputs = outputs.columns
    added = [output.name for output in outputs.columns if not output.exists]
    if added and not visitor.may_add_columns:
        form.errors[at] = f"You may not add the column {added[0]!r} to this table."


async def _check_model(form: Form, datasette: Any, spec: JobSpec, schema: dict[str, Any] | None) -> None:
    errors = form.errors
    if spec.model not in {choice.model_id for choice in form.models}:
        known = "Choose one of the list." if form.models else "There is no model that you may use here."
        errors["model"] = f"The model {spec.model or ''!r} is not available. {known}"
        return
    try:
        model = await LLM(datasette).model(spec.model, purpose=PURPOSE, actor=spec.actor)
    except ModelNotFoundError as error:
        errors["model"] = str(error)
        return
    plain = replace(spec, options={}, max_cost=None)
    _try(errors, "model", partial(plain.check_model, model, None))
    if schema is not None:
        _try(errors, "schema", partial(plain.check_model, model, schema))
    _try(errors, "options", partial(replace(plain, options=spec.options).check_model, model, None))
    _try(errors, "max_cost", partial(replace(plain, max_cost=spec.max_cost).check_model, model, None))


def _try(errors: dict[str, str], name: str, function: Any) -> Any:
    try:
        return function()
    except EnrichInputError as error:
        errors.setdefault(name, str(error))
        return None


def _options(text: str, errors: dict[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if name and not value.strip():
            errors["options"] = (
                f"The option {name!r} has no value: write one a line, such as: temperature 0.2"
            )
        elif name:
            options[name] = value.strip()
    return options


def _number(text: str, name: str, errors: dict[str, str], kind: Any) -> Any:
    if not text:
        return None
    try:
        number = kind(text.lstrip("$").replace(",", ""))
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        errors[name] = f"Write a number that is more than 0, not {text!r}, or leave it empty."
        return None
    return number


async def prepare(datasette: Any) -> None:
    """Look a model and its price up, so that the next one who does finds everything loaded."""
    plan = get_plan(datasette, PURPOSE)
    for model_id in plan.ids[:1]:
        await find_pricing(plan.snapshot.get(model_id))


async def _models(datasette: Any, actor: dict[str, Any] | None) -> list[Choice]:
    plan = None
    choices = []
    for model in await LLM(datasette).models(actor=actor, purpose=PURPOSE):
        plan = plan or get_plan(datasette, PURPOSE)
        pricing = plan.price(model.model_id) or await find_pricing(model)
        price = ""
        if pricing is not None:
            sent, received = pricing.cost(Usage(MILLION, 0)), pricing.cost(Usage(0, MILLION))
            if sent is not None and received is not None:
                price = f"${sent:,.2f} in, ${received:,.2f} out a million tokens"
        choices.append(Choice(model.model_id, price, bool(getattr(model, "supports_schema", False))))
    return choices
