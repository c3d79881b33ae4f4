"""What a job did, as data and as the text that closes it."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .batches import left_in_batches
from .stopped import REFUSED_REASONS, advice, sentence
from .words import counted, dollars, duration, none_waits

if TYPE_CHECKING:
    from ..sql import SQLValue
    from .batches import BatchNotes
    from .stopped import StopReason

_WIDTH = 80
_EXAMPLE_CHARACTERS = 200
#: Seconds after which a row that is one of the last is one that is waited for.
TAIL_SECONDS = 10.0


@dataclass(slots=True)
class FailureKind:
    """Rows that failed alike: how many, and one of them as an example.

    Attributes:
        kind: what happened: ``cut off``, ``filtered``, ``refused``, ``empty``, ``not JSON``, ``does not fit
            the schema``, ``several answers``, ``not a number``, ``cannot be stored``, ``refused by the
            table``, ``rate limited``, ``timed out``, ``rejected`` and so on; ``error`` where only
            `exception` tells.
        count: how many rows.
        example: the error of the first one.
        pk: the key of that row.
        exception: the name of the exception's class, for failures of the kind ``error``.
        rows: the keys of the first twenty rows.
    """

    kind: str
    count: int
    example: str
    pk: tuple[SQLValue, ...]
    exception: str | None = None
    rows: list[tuple[SQLValue, ...]] = field(default_factory=list)


@dataclass(slots=True)
class EnrichProgress:
    """How far a job is; ``on_progress`` gets one a few times a second and one at the end.

    Attributes:
        total: rows to do when the job began; ``None`` until they are counted.
        done: rows that are through: written, failed, changed meanwhile or skipped.
        written: rows that got their value.
        failed: rows that failed.
        changed: rows deleted, edited or filled by somebody else while their prompt was out.
        skipped: rows whose prompt is empty: there is nothing to ask.
        running: prompts in flight.
        retries: model calls beyond the first of a prompt.
        input_tokens: tokens sent, as the models counted them.
        output_tokens: tokens received.
        cost: what the answers cost so far in dollars; ``None`` if no price is known.
        elapsed: seconds since the job began.
        stopping: why it is stopping, if it is.
        paused: no more rows are asked about until somebody has it go on.
        waiting: what keeps the database from being used, or the provider from being reached, and since when,
            in words: nothing is sent then. Or for how long nothing was answered.
        quota_seconds: how long a quota that is used up is still waited for, if it is.
        stalled: whether nothing goes on, and nobody knows for how long.
        oldest_seconds: how long ago the first of the rows left was asked about, once all of them are.
    """

    total: int | None = None
    done: int = 0
    written: int = 0
    failed: int = 0
    changed: int = 0
    skipped: int = 0
    running: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    elapsed: float = 0.0
    stopping: StopReason | None = None
    paused: bool = False
    waiting: str | None = None
    quota_seconds: float | None = None
    stalled: bool = False
    oldest_seconds: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at this rate; ``None`` where that cannot be known."""
        rate = self.rows_per_second
        if self.total is None or not rate or self.stalled or self.quota_seconds is not None or self.is_tail:
            return None
        return (self.total - self.done) / rate

    @property
    def is_tail(self) -> bool:
        """Whether all rows left have been asked about, and a while ago: no rate says when they come."""
        return self.oldest_seconds is not None and self.oldest_seconds >= TAIL_SECONDS

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
        reused: those of the rows written that asked what another row had asked: nothing was sent for them.
        no_value: those of the rows written whose answer was that there is no value.
        skipped: rows whose prompt is empty: nothing was sent, and nothing is wrong. They are not counted
            in a limit. Of a dry run: how many of the rows shown.
        in_side_file: rows whose values could not be written and are in ``side_file``, which the next run
            takes up first. Rows sent are those written, failed, changed, in the side file, lost and
            cancelled.
        side_file: its path.
        lost: rows whose answers could be written nowhere.
        taken_up: rows that got the values which an earlier run had left in a side file.
        outdated: answers of an earlier run that were dropped: their rows were deleted, edited or filled.
        cancelled: prompts that were in flight when the job was stopped and had no answer yet.
        remaining: rows that this run did not get to, if that is known.
        retries: model calls beyond the first of a prompt.
        input_tokens: tokens sent, as the models counted them.
        output_tokens: tokens received.
        cost: what the answers cost in dollars; ``None`` if no price is known.
        unpriced: answers that are not in ``cost``, since their price is not known.
        saved_input_tokens: tokens that reused answers would have taken.
        saved_output_tokens: likewise.
        saved_cost: what these would have cost in dollars; ``None`` if no price is known.
        elapsed: seconds.
        write_seconds: the part of them during which a write was under way.
        stopped: why it ended before the last row, or ``None``.
        trouble: what kept the database from being used, if that is why.
        refusal: what the provider said, where it would have refused every other row too.
        quota_seconds: how long until a quota that is used up is back, if the provider said so.
        failures: the kinds of failures, most frequent first.
        prompts: the first prompts; only of a dry run.
        dry_run: nothing was sent and nothing was written.
        stale: it was about answers that are out of date.
        resume_where: after an early end with ``overwrite``: an SQL condition for the rows not done
            yet. Without ``overwrite`` the same call goes on by itself.
        run: its number in the record, if it has one.
        incomplete: rows that were answered with an earlier schema, which lacked ``incomplete_columns``.
        submitted: rows that were put into batches.
        in_batches: rows that are in batches, and were left alone; of a run with batches, those that still
            have no answer.
        returned: rows whose batch did not answer them (it expired, say): they wait again.
        batch: what a run with batches did, and has left to do.
    """

    database: str
    table: str
    columns: tuple[str, ...]
    model: str | None = None
    total: int | None = None
    written: int = 0
    failed: int = 0
    changed: int = 0
    reused: int = 0
    no_value: int = 0
    skipped: int = 0
    in_side_file: int = 0
    side_file: str | None = None
    lost: int = 0
    taken_up: int = 0
    outdated: int = 0
    cancelled: int = 0
    remaining: int | None = None
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    unpriced: int = 0
    saved_input_tokens: int = 0
    saved_output_tokens: int = 0
    saved_cost: float | None = None
    elapsed: float = 0.0
    write_seconds: float = 0.0
    stopped: StopReason | None = None
    trouble: str | None = None
    refusal: str | None = None
    quota_seconds: float | None = None
    failures: list[FailureKind] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    dry_run: bool = False
    stale: bool = False
    resume_where: str | None = None
    run: int | None = None
    incomplete: int = 0
    incomplete_columns: tuple[str, ...] = ()
    submitted: int = 0
    in_batches: int = 0
    returned: int = 0
    batch: BatchNotes | None = None

    @property
    def done(self) -> int:
        """Rows that are through, whatever became of them."""
        return self.written + self.failed + self.changed + self.skipped

    @property
    def rows_per_second(self) -> float:
        return self.done / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def why_stopped(self) -> str:
        """Why it ended before the last row, for people."""
        return "" if self.stopped is None else sentence(self.stopped, self.quota_seconds)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as data that JSON can show."""
        data = asdict(self)
        data["done"] = self.done
        if data["batch"] is None:
            del data["batch"]
        data["rows_per_second"] = round(self.rows_per_second, 3)
        if self.cost is not None:
            data["cost"] = round(self.cost, 9)
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
        skipped = f"{counted(self.skipped, 'row')} skipped: nothing to ask"
        lines = self._taken_up()
        if self.batch is not None:
            lines += self.batch.lines(
                self.model,
                submitted=self.submitted,
                inside=self.in_batches,
                returned=self.returned,
                interrupted=self.stopped is not None,
            )
            if not (self.written or self.failed or self.changed or self.stopped):
                return "\n".join(lines)
        if self.done == self.skipped and not self.stopped and not self.in_side_file and not self.lost:
            if not self.skipped:
                lines.append(f"Nothing left to do: {none_waits(where, stale=self.stale)}.")
                if self.in_batches:
                    lines.append(left_in_batches(self.in_batches))
                lines += self._incomplete()
            else:
                lines.append(f"Nothing left to do: each row of {where} without a value has an empty prompt.")
                lines.append(skipped)
            return "\n".join(lines)
        lines.append(f"{counted(self.written, 'row')} of {where} written with {self.model}")
        if self.stopped:
            left = f", {counted(self.remaining, 'row')} left" if self.remaining is not None else ""
            lines.append(f"Stopped early: {self.trouble or self.why_stopped}{left}")
            if self.stopped in REFUSED_REASONS:
                lines += advice(self.stopped, self.refusal, self.quota_seconds)
        lines += self._unwritten()
        if self.failed:
            each = "it" if self.failed == 1 else "each"
            # Their records may be in the side file, or nowhere.
            recorded = "" if self.trouble else f" ({each} is in _llm_enrich_errors)"
            lines.append(f"{counted(self.failed, 'row')} failed{recorded}:")
            lines += map(_failure_line, self.failures)
        if self.reused:
            saved = self.saved_input_tokens + self.saved_output_tokens
            lines.append(
                f"{counted(self.reused, 'row')} asked what another row had asked: "
                f"{counted(self.reused, 'prompt')} and {counted(saved, 'token')} saved"
                + ("" if self.saved_cost is None else f", {dollars(self.saved_cost)}")
            )
        if self.no_value:
            lines.append(f"{counted(self.no_value, 'row')} answered with no value")
        lines += self._incomplete()
        if self.in_batches and self.batch is None:
            lines.append(left_in_batches(self.in_batches))
        if self.skipped:
            lines.append(skipped)
        if self.changed:
            were, answer = ("was", "its answer") if self.changed == 1 else ("were", "their answers")
            changed = f"{counted(self.changed, 'row')} {were} deleted, edited or filled meanwhile"
            lines.append(f"{changed}: {answer} {were} dropped")
        if self.cancelled:
            were = "was" if self.cancelled == 1 else "were"
            lines.append(f"{counted(self.cancelled, 'prompt')} in flight {were} cancelled")
        retried = f", {counted(self.retries, 'retry', 'retries')}" if self.retries else ""
        lines.append(
            f"{counted(self.input_tokens, 'token')} in, {self.output_tokens:,} out, "
            f"{self._cost_in_words()}, {duration(self.elapsed)}, {self.rows_per_second:,.1f} rows/s{retried}"
        )
        return "\n".join(lines)

    def _cost_in_words(self) -> str:
        if self.cost is None:
            return "no price known"
        without = f" (and {counted(self.unpriced, 'answer')} of no known price)" if self.unpriced else ""
        return dollars(self.cost) + without

    def _incomplete(self) -> list[str]:
        if not self.incomplete:
            return []
        names = ", ".join(self.incomplete_columns)
        have = "has" if self.incomplete == 1 else "have"
        rows = counted(self.incomplete, "row")
        return [f"{rows} {have} values of an earlier schema and no {names} yet: --stale asks again"]

    def _taken_up(self) -> list[str]:
        lines = []
        if self.taken_up:
            lines.append(
                f"{counted(self.taken_up, 'answer')} written that an earlier run had to leave in a file"
            )
        if self.outdated:
            lines.append(
                f"{counted(self.outdated, 'answer')} dropped that an earlier run had left in a file: "
                "deleted, edited or filled rows"
            )
        return lines

    def _unwritten(self) -> list[str]:
        lines = []
        if self.in_side_file:
            kept = f"{counted(self.in_side_file, 'answer')} could not be written and went to {self.side_file}"
            lines.append(f"{kept}: the next run writes what is there first, and asks nothing twice")
        if self.lost:
            lost = f"{counted(self.lost, 'answer')} could be written nowhere: lost"
            lines.append(f"{lost}, since neither the database nor a file for them could be written")
        return lines

    def _dry_summary(self, where: str) -> str:
        if not self.total:
            nothing = none_waits(where, stale=self.stale)
            return "\n".join(
                [f"Dry run: {nothing}; nothing would be sent to {self.model}.", *self._incomplete()]
            )
        lines = [
            f"Dry run: {counted(self.total, 'row')} of {where} would be sent to {self.model}; nothing was."
        ]
        if self.skipped:
            would = f"{self.skipped} would be skipped: nothing to ask"
            lines.append(f"Of the {counted(len(self.prompts), 'row')} shown, {would}.")
        for number, prompt in enumerate(self.prompts, 1):
            shown = prompt if len(prompt) <= 1_000 else f"{prompt[:1_000]}... ({len(prompt):,} characters)"
            lines.append(f"--- prompt {number} ---\n{shown}")
        lines += self._incomplete()
        return "\n".join(lines)


def _failure_line(failure: FailureKind) -> str:
    """Return what happened, how often, and an example of it, in lines that fit a terminal."""
    example = " ".join(failure.example.split())
    example = example if len(example) <= _EXAMPLE_CHARACTERS else example[:_EXAMPLE_CHARACTERS] + "..."
    key = failure.pk[0] if len(failure.pk) == 1 else failure.pk
    kind = f"{failure.kind} ({failure.exception})" if failure.exception else failure.kind
    return textwrap.fill(
        f"{failure.count:,} x {kind}, for instance row {key!r}: {example}",
        width=_WIDTH,
        initial_indent="  ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )
