"""The record of one run, kept in the transactions that write its values."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from ..record.answers import Answered, note_answers
from ..record.runs import RunDescription, RunNumbers, add_numbers, announce_run, begin_run, end_run

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence

    from ..plan import Plan
    from ..record.runs import RunId
    from ..sql import SQLValue
    from ..telling.report import FailureKind
    from .results import Outcome


class Recorder:
    """Records one run. Everything but making one runs in Datasette's write thread.

    Attributes:
        run: the run, once a transaction of it has been committed.
        number: its number, once it is on record.
    """

    def __init__(self, description: RunDescription) -> None:
        self.run: RunId | None = None
        self.number: int | None = None
        #: Called in each transaction with the keys of the rows that it settles.
        self.on_settle: Callable[[sqlite3.Connection, RunId, list[tuple[SQLValue, ...]]], None] | None = None
        self._description = description

    def begin(self, conn: sqlite3.Connection) -> RunId:
        """Return the run, begun in this transaction if need be; whoever commits it tells `committed`."""
        return self.run or begin_run(conn, self._description, announced=self.number)

    def announce(self, conn: sqlite3.Connection) -> None:
        """Record that the run is under way, before it has any answer."""
        conn.execute("begin immediate")
        self.number = announce_run(conn, self._description)
        conn.commit()

    def note(self, conn: sqlite3.Connection, outcome: Outcome) -> RunId:
        """Record what a transaction is about to commit; the run begins with the first one.

        Returns:
            the run, to be told to `committed` when that has been.
        """
        run = self.begin(conn)
        written = outcome.written
        note_answers(
            conn,
            run,
            [
                Answered(
                    each.row.key, each.question, each.input_tokens, each.output_tokens, no_value=each.no_value
                )
                for each in written
                if each.question is not None
            ],
        )
        answered = [*written, *outcome.failed]
        numbers = RunNumbers(
            written=len(written),
            reused=sum(each.reused for each in written),
            no_value=sum(each.no_value for each in written),
            failed=len(outcome.failed),
            input_tokens=sum(each.input_tokens or 0 for each in answered),
            output_tokens=sum(each.output_tokens or 0 for each in answered),
            cost=sum(each.cost or 0.0 for each in answered),
        )
        add_numbers(conn, run, numbers)
        if self.on_settle is not None:
            self.on_settle(conn, run, [each.row.key for each in (*answered, *outcome.changed)])
        return run

    def committed(self, run: RunId) -> None:
        """The transaction in which the run was noted is committed."""
        self.run = run
        self.number = run.run

    def end(
        self,
        conn: sqlite3.Connection,
        *,
        outcome: str,
        skipped: int = 0,
        cost: float | None = None,
        failures: Sequence[FailureKind] = (),
    ) -> None:
        """Record how the run ended, if it ever began."""
        if self.number is None:
            return
        kinds = [
            {"kind": each.kind, "count": each.count, "example": each.example, "rows": _named(each.rows)}
            for each in failures
        ]
        conn.execute("begin immediate")
        end_run(conn, self.number, outcome, skipped=skipped, cost=cost, failures=kinds)
        conn.commit()


def _named(keys: Sequence[tuple[SQLValue, ...]]) -> list[list[SQLValue]]:
    """Return the keys that JSON can hold."""
    return [list(key) for key in keys if not any(isinstance(value, bytes) for value in key)]


def recorder_of(plan: Plan, model_id: str, versions: Mapping[str, str]) -> Recorder | None:
    """Return what records a run of this plan, or ``None`` if it is not to be recorded.

    Args:
        model_id: the model that answers.
        versions: of what answers.
    """
    spec = plan.spec
    if not spec.record:
        return None
    asked = {
        "where": spec.where,
        "limit": spec.limit,
        "purpose": spec.purpose,
        "overwrite": spec.overwrite,
        "retry_failed": spec.retry_failed,
        "stale": spec.stale,
        "batch": spec.batch,
        "column": spec.column,
        "attachments": list(spec.attachments) or None,
        "extract": spec.extract,
        "allow_cut": spec.allow_cut,
        "allow_empty": spec.allow_empty,
        "max_cost": spec.max_cost,
        "schema": spec.schema if isinstance(spec.schema, str) else None,
    }
    return Recorder(
        RunDescription(
            table=plan.table.name,
            columns=tuple(output.name for output in plan.outputs.columns),
            model=model_id,
            prompt=spec.prompt,
            by=spec.by or (str(spec.actor["id"]) if spec.actor and "id" in spec.actor else None),
            options=plan.options,
            system=spec.system,
            schema=plan.schema,
            spec={name: value for name, value in asked.items() if value not in (None, False)},
            versions=versions,
        )
    )


def versions_of(model: Any) -> dict[str, str]:
    """Return the versions of this package, llm and the model's plugin."""
    plugin = type(getattr(model, "model", model)).__module__.partition(".")[0].replace("_", "-")
    versions = {}
    for name in ("datasette-llm", "llm", plugin):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
