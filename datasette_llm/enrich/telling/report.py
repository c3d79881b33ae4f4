"""What a job did, as data and as the text that closes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..reading.table import SQLValue

StopReason = Literal[
    "deadline", "failing", "key_refused", "max_failures", "max_tokens_total", "SIGINT", "SIGTERM", "stopped"
]

_STOPPED = {
    "deadline": "the deadline has passed",
    "failing": "a hundred prompts in a row failed; --max-failures N allows N failures",
    "key_refused": "the API key is refused",
    "max_failures": "too many rows failed",
    "max_tokens_total": "the tokens are spent",
    "SIGINT": "interrupted",
    "SIGTERM": "terminated",
    "stopped": "stopped",
}


@dataclass(slots=True)
class FailureKind:
    """Rows that failed alike: how many, and one of them as an example.

    Attributes:
        kind: the name of the exception's class.
        count: how many rows.
        example: the error of the first one.
        pk: the key of that row.
    """

    kind: str
    count: int
    example: str
    pk: tuple[SQLValue, ...]


@dataclass(slots=True)
class EnrichProgress:
    """How far a job is; ``on_progress`` gets one a few times a second and one at the end.

    Attributes:
        total: rows to do when the job began; ``None`` until they are counted.
        done: rows that are through: written, failed or changed meanwhile.
        written: rows that got their value.
        failed: rows that failed.
        changed: rows deleted, edited or filled by somebody else while their prompt was out.
        running: prompts in flight.
        retries: model calls beyond the first of a prompt.
        input_tokens: tokens sent, as the models counted them.
        output_tokens: tokens received.
        elapsed: seconds since the job began.
        stopping: why it is stopping, if it is.
    """

    total: int | None = None
    done: int = 0
    written: int = 0
    failed: int = 0
    changed: int = 0
    running: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    elapsed: float = 0.0
    stopping: StopReason | None = None

    @property
    def rows_per_second(self) -> float:
        return self.done / self.elapsed if self.elapsed > 0 else 0.0


@dataclass(slots=True)
class EnrichReport:
    """What a job did.

    Attributes:
        database: the name Datasette knows it by.
        table: the table, as SQLite spells it.
        columns: the columns that answers went to.
        model: the id of the model, ``None`` if there was nothing to do.
        total: rows that were to do; ``None`` if the job ended before they were counted.
        written: rows that got their value.
        failed: rows that failed; ``_llm_enrich_errors`` has each of them.
        changed: rows that were deleted, edited or filled by somebody else while their prompt was
            out: their answers were dropped, and those that still lack a value are for the next run.
        cancelled: prompts that were in flight when the job was stopped and had no answer yet.
        remaining: rows that this run did not get to, if that is known.
        retries: model calls beyond the first of a prompt.
        input_tokens: tokens sent, as the models counted them.
        output_tokens: tokens received.
        elapsed: seconds.
        write_seconds: the part of them during which a write was under way.
        stopped: why it ended before the last row, or ``None``.
        failures: the kinds of failures, most frequent first.
        prompts: the first prompts; only of a dry run.
        dry_run: nothing was sent and nothing was written.
        resume_where: after an early end with ``overwrite``: an SQL condition for the rows not done
            yet. Without ``overwrite`` the same call goes on by itself.
    """

    database: str
    table: str
    columns: tuple[str, ...]
    model: str | None = None
    total: int | None = None
    written: int = 0
    failed: int = 0
    changed: int = 0
    cancelled: int = 0
    remaining: int | None = None
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    elapsed: float = 0.0
    write_seconds: float = 0.0
    stopped: StopReason | None = None
    failures: list[FailureKind] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    dry_run: bool = False
    resume_where: str | None = None

    @property
    def done(self) -> int:
        """Rows that are through, whatever became of them."""
        return self.written + self.failed + self.changed

    @property
    def rows_per_second(self) -> float:
        return self.done / self.elapsed if self.elapsed > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as data that JSON can show."""
        data = asdict(self)
        data["done"] = self.done
        data["rows_per_second"] = round(self.rows_per_second, 3)
        for name in ("elapsed", "write_seconds"):
            data[name] = round(data[name], 3)
        for failure in data["failures"]:
            failure["pk"] = [
                value if not isinstance(value, bytes) else value.hex() for value in failure["pk"]
            ]
        return data

    def summary(self) -> str:
        """Return the closing lines for a person."""
        where = f"{self.table} ({', '.join(self.columns)})"
        if self.dry_run:
            return self._dry_summary(where)
        if not self.done and not self.stopped:
            return f"Nothing left to do: no row of {where} is waiting for a value."
        lines = [f"{self.written:,} rows of {where} written with {self.model}"]
        if self.stopped:
            left = f", {self.remaining:,} rows left" if self.remaining is not None else ""
            lines.append(f"Stopped early: {_STOPPED[self.stopped]}{left}")
        if self.failed:
            lines.append(f"{self.failed:,} rows failed (each is in _llm_enrich_errors):")
            for failure in self.failures:
                example = " ".join(failure.example.split())
                example = example if len(example) <= 200 else example[:200] + "..."
                key = failure.pk[0] if len(failure.pk) == 1 else failure.pk
                lines.append(f"  {failure.count:,} x {failure.kind}, for instance row {key!r}: {example}")
        if self.changed:
            lines.append(
                f"{self.changed:,} rows were deleted, edited or filled meanwhile: their answers were dropped"
            )
        if self.cancelled:
            lines.append(f"{self.cancelled:,} prompts in flight were cancelled")
        retried = f", {self.retries:,} retries" if self.retries else ""
        lines.append(
            f"{self.input_tokens:,} tokens in, {self.output_tokens:,} out, "
            f"{duration(self.elapsed)}, {self.rows_per_second:,.1f} rows/s{retried}"
        )
        return "\n".join(lines)

    def _dry_summary(self, where: str) -> str:
        lines = [f"Dry run: {self.total:,} rows of {where} would be sent to {self.model}; nothing was."]
        for number, prompt in enumerate(self.prompts, 1):
            shown = prompt if len(prompt) <= 1_000 else f"{prompt[:1_000]}... ({len(prompt):,} characters)"
            lines.append(f"--- prompt {number} ---\n{shown}")
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a time for people: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
