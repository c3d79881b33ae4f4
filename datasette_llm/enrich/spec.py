"""What a job is asked to do, and whether its model can do it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from datasette_llm.calls.workers import workers_from

from .database import LOCKED_SECONDS
from .errors import EnrichInputError
from .telling.words import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from .sql import SQLValue


@dataclass(frozen=True)
class NamedRows:
    """Rows that somebody else has chosen.

    Attributes:
        columns: the columns that name a row: those of the primary key, or ``("rowid",)``.
        keys: their values, one tuple a row.
    """

    columns: tuple[str, ...]
    keys: tuple[tuple[SQLValue, ...], ...]


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a job is asked to do; `datasette_llm.enrich` explains each of these.

    Attributes:
        batch: its prompts are answered in batches.
        batch_size: how many prompts one batch has at most; by default as many as the provider takes.
        wait: stay until all batches have been collected.
        batch_cancel: cancel the batches, and submit none.
        include_submitted: also ask about rows that are in a batch.
        only: the rows it is about, instead of all of the table.
        log: whether responses go to llm's own log database, too.
        files: whether attachments may be files of this machine: for a user of it, not for its visitors.
        by: who asks for it, for the record, if it is no actor.
    """

    database: str
    table: str
    prompt: str
    column: str | None = None
    model: str | None = None
    purpose: str | None = None
    actor: dict[str, Any] | None = None
    system: str | None = None
    schema: str | Mapping[str, Any] | type[BaseModel] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None
    limit: int | None = None
    concurrency: int | None = None
    overwrite: bool = False
    retry_failed: bool = False
    stale: bool = False
    reuse: bool = True
    record: bool = True
    dry_run: bool = False
    attachments: tuple[str, ...] = ()
    files: bool = False
    log: bool = False
    extract: bool | Literal["last"] = False
    allow_cut: bool = False
    allow_empty: bool = False
    max_failures: int | None = None
    max_tokens_total: int | None = None
    max_cost: float | None = None
    deadline: float | None = None
    lock_timeout: float = LOCKED_SECONDS
    wait_for_quota: float | None = None
    timeout: float | None = None
    outage_timeout: float | None = None
    workers: Any = None
    workers_timeout: float | None = None
    key: str | None = field(default=None, repr=False)
    batch: bool = False
    batch_size: int | None = None
    wait: bool = False
    batch_cancel: bool = False
    include_submitted: bool = False
    only: NamedRows | None = None
    by: str | None = None

    @property
    def replaces(self) -> bool:
        """Whether answers replace the values that rows have."""
        return self.overwrite or self.stale

    def check(self) -> None:
        """Check what needs neither the database nor the model.

        Raises:
            EnrichInputError: a number makes no sense.
        """
        for name in (
            "limit",
            "batch_size",
            "concurrency",
            "max_failures",
            "max_tokens_total",
            "max_cost",
            "deadline",
            "wait_for_quota",
            "timeout",
            "outage_timeout",
            "workers_timeout",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EnrichInputError(f"{name} must be more than 0, not {value}")
        try:
            workers_from(self.workers)
        except ValueError as error:
            raise EnrichInputError(str(error)) from None
        self._check_stale()
        self._check_batch()
        if not self.lock_timeout >= 0:
            raise EnrichInputError(f"lock_timeout must not be less than 0, as {self.lock_timeout} is")

    def _check_stale(self) -> None:
        if not self.stale:
            return
        if not self.record:
            raise EnrichInputError(
                "Without the record of answers nothing can be told to be stale: do without --no-record"
            )
        for name in ("overwrite", "retry_failed"):
            if getattr(self, name):
                option = name.replace("_", "-")
                raise EnrichInputError(f"--stale and --{option} are about different rows: give one of them")

    def _check_batch(self) -> None:
        if not self.batch:
            for name in ("wait", "batch_cancel", "batch_size"):
                if getattr(self, name):
                    option = name.replace("_", "-")
                    raise EnrichInputError(f"--{option} is about batches: give --batch too")
            return
        if self.include_submitted:
            raise EnrichInputError("--include-submitted is for live runs: a row is never in two batches")
        if not self.record:
            raise EnrichInputError(
                "Batches are kept in the record of answers: do without --no-record, or without --batch"
            )
        if not self.reuse:
            raise EnrichInputError(
                "In batches, rows that ask the same are always asked once: do without --no-reuse or --batch"
            )
        if self.max_tokens_total is not None:
            raise EnrichInputError(
                "What a batch takes is known when it is done: limit it with --max-cost or --limit, "
                "not with --max-tokens-total"
            )

    def prompt_keywords(self, schema: dict[str, Any] | None) -> dict[str, Any]:
        """Return what every prompt of the job is sent with."""
        options = dict(self.options) or None
        given = {"system": self.system, "schema": schema, "key": self.key, "options": options}
        return {name: value for name, value in given.items() if value is not None}

    def check_model(self, model: Any, schema: dict[str, Any] | None) -> None:
        """Refuse at once what the model would refuse for every single row.

        Args:
            model: the group's model; llm's own is its ``model``.
            schema: what answers have to be.

        Raises:
            EnrichInputError: there is no key for the model, or it takes no schema, attachments, or not such
            options, or a limit to its cost is given and its price is not known.
        """
        inner = getattr(model, "model", None)
        needs_key = getattr(inner, "needs_key", None)
        if needs_key and not self.key and not getattr(model, "_key", None):
            raise EnrichInputError(_no_key(model.model_id, needs_key, getattr(inner, "key_env_var", None)))
        if schema is not None and not getattr(inner, "supports_schema", True):
            raise EnrichInputError(
                f"The model {model.model_id!r} does not support schemas: do without, or choose another model"
            )
        if self.attachments and not getattr(inner, "attachment_types", None):
            raise EnrichInputError(
                f"The model {model.model_id!r} takes no attachments: do without, or choose another model"
            )
        if self.max_cost is not None and getattr(model, "pricing", None) is None:
            raise EnrichInputError(no_price(model.model_id))
        options_class = getattr(inner, "Options", None)
        if options_class is None or not self.options:
            return
        try:
            options_class(**self.options)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                name = str(problem["loc"][0]) if problem["loc"] else ""
                if name in self.options:  # Others may come from the configuration.
                    known = nearest(name, options_class.model_fields, what="its options are")
                    raise EnrichInputError(
                        f"The option {name!r} is not right for {model.model_id!r}: {problem['msg']}; {known}"
                    ) from None


def no_price(model_id: str) -> str:
    """Return why the cost of a model cannot be limited, and what to do."""
    return (
        f"No price is known for {model_id!r}, so its cost cannot be limited: configure it as "
        f"plugins.datasette-llm.prices.{model_id}: {{input: DOLLARS, output: DOLLARS}} (per million tokens), "
        "or limit the tokens with --max-tokens-total"
    )


def _no_key(model_id: str, needs_key: str, variable: str | None) -> str:
    ways = ["give one with --key", f"store one with: llm keys set {needs_key}"]
    if variable:
        ways.append(f"set {variable}")
    return f"The model {model_id!r} needs an API key and there is none: {', or '.join(ways)}"
