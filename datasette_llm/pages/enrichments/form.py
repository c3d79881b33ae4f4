"""The form of a job: what can be asked for, and everything that can be wrong with it before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from wtforms import BooleanField, Form, SelectField, StringField, TextAreaField
from wtforms.validators import DataRequired

from ...enrich.answers.outputs import Outputs
from ...enrich.answers.schema import read_schema
from ...enrich.errors import EnrichInputError
from ...enrich.reading.template import PromptTemplate
from ..columns import column_reference

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ...enrich.reading.table import Table

_LINES = "height: {}em; font-family: monospace"


def make_form(table: Table, models: Mapping[str, bool], *, may_add_columns: bool) -> type[Form]:
    """Return the form for one table and one visitor.

    Args:
        table: whose rows are enriched.
        models: the ids of the models to choose from, the default first, and whether each takes a schema.
        may_add_columns: answers may go to a column that does not exist yet.
    """
    references = {column.name: column_reference(column.name) for column in table.columns}
    texts = [column.name for column in table.columns if column.affinity == "TEXT" and not column.key_position]
    example = references[(texts or list(references))[-1]]

    class ConfigForm(Form):  # type: ignore[misc]  # wtforms ships no types
        model = SelectField("Model", choices=list(models), validate_choice=False)
        prompt = TextAreaField(
            "Prompt",
            description=_suggestions(references.values()),
            validators=[DataRequired("Write what to ask about each row.")],
            render_kw={"style": _LINES.format(8), "placeholder": f"Summarize: {example}"},
        )
        system = TextAreaField(
            "System prompt",
            description="Optional: how to answer; the same for every row, without columns.",
            render_kw={"style": _LINES.format(4)},
        )
        column = StringField(
            "Output column",
            description="Receives the answers; added to the table if it does not exist."
            if may_add_columns
            else "Receives the answers; one that exists, since you may not add columns to this table.",
        )
        schema = TextAreaField(
            "Schema",
            description="Optional: one column per property, typed, such as: name, age int, bio: one "
            "sentence. Or a JSON schema. The output column is optional then, and receives all as JSON.",
            render_kw={"style": _LINES.format(4)},
        )
        overwrite = BooleanField(
            "Overwrite",
            description="Also ask about rows that have a value, and replace it; else they are skipped.",
        )

        def validate(self, extra_validators: Any = None) -> bool:
            """Check everything that can be checked without the rows; errors stand beside their fields."""
            valid = bool(super().validate(extra_validators))
            for field in (self.prompt, self.system, self.column, self.schema):
                field.data = (field.data or "").strip()
            return all([valid, self._check_model(), self._check_prompt(), self._check_outputs()])

        def _check_model(self) -> bool:
            if self.model.data in models:
                return True
            known = "Choose one of the list." if models else "There is no model that you may use here."
            return _wrong(self.model, f"The model {self.model.data or ''!r} is not available. {known}")

        def _check_prompt(self) -> bool:
            try:
                PromptTemplate(self.prompt.data or " ", table.column_names)
            except EnrichInputError as error:
                # An empty one has been found already.
                return bool(self.prompt.errors) or _wrong(self.prompt, str(error))
            return True

        def _check_outputs(self) -> bool:
            schema, name = None, self.column.data or None
            valid = True
            if self.schema.data:
                try:
                    schema = read_schema(self.schema.data)
                except EnrichInputError as error:
                    valid = _wrong(self.schema, str(error))
                    if name is None:
                        return valid
                if not models.get(self.model.data, True):
                    valid = _wrong(self.schema, f"The model {self.model.data!r} does not support schemas.")
            field = self.schema if name is None and schema is not None else self.column
            try:
                outputs = Outputs(table, name, schema)
            except EnrichInputError as error:
                return _wrong(field, str(error))
            added = [output.name for output in outputs.columns if not output.exists]
            if added and not may_add_columns:
                return _wrong(field, f"You may not add the column {added[0]!r} to this table.")
            return valid

    return ConfigForm


def spec_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a filled-in form says, as fields of a job's `JobSpec`."""
    return {
        "prompt": config["prompt"],
        "column": config["column"] or None,
        "model": config["model"],
        "system": config["system"] or None,
        "schema": config["schema"] or None,
        "overwrite": bool(config["overwrite"]),
    }


def _wrong(field: Any, message: str) -> bool:
    field.errors = [*field.errors, message]
    return False


def _suggestions(references: Iterable[str]) -> Markup:
    columns = Markup(", ").join(Markup("<code>{}</code>").format(reference) for reference in references)
    return Markup("A Jinja template over the row. The columns are: {}").format(columns)
