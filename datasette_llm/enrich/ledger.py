"""The books of one job: every row from pulled to settled, and when to pull no more.

A row is *pulled* when its prompt is about to be asked, *answered* when that has come to an end, and
*settled* when the database holds what came of it (or nothing is to be held).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import anyio

from ..calls.prices import Usage
from ..calls.trouble import said_by
from ..secrecy import redacted
from .errors import concerns_one_row
from .telling.kinds import OTHER, group_of
from .telling.report import EnrichProgress, FailureKind
from .telling.weather import Unanswered, away_in_words

if TYPE_CHECKING:
    from .reading.selection import Row, Selection
    from .reuse import Answer
    from .spec import JobSpec
    from .sql import SQLValue
    from .telling.report import EnrichReport
    from .telling.stopped import StopReason
    from .trouble import Watch
    from .writing.results import Outcome

# So many failures with no success between them, and a job ends that has no limit of its own: the provider
# is down, or a plugin's budget is spent and refuses answers that have been paid for.
FAILURES_IN_A_ROW = 100
# A shorter cooldown is over before anybody has read of it.
SHOWN_SECONDS = 1.0
# Of rows that failed alike so many are named, for people to look at.
SHOWN_ROWS = 20


class Ledger:
    """Counts the rows of a job, and decides when it is over.

    Attributes:
        progress: how far the job is, as of the last `update_progress`.
        stopping: why no more rows are pulled, if that is so.
        cancel_at: when prompts in flight are cancelled.
        model: the group's model, once there is one.
        skipped: rows that there was nothing to ask about.
        counted: rows that were to do when they were counted, whatever the limit; ``None`` until then.
        saved_input_tokens: of questions that were not sent, since their answers were known.
        saved_output_tokens: likewise.
        watches: what may keep the job waiting for its database.
        note: what else is waited for.
        trouble: what keeps the database from being used, if that is why the job stops.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self.progress = EnrichProgress()
        self.stopping: StopReason | None = None
        self.cancel_at = math.inf
        self.model: Any = None
        self.watches: list[Watch] = []
        self.trouble: str | None = None
        self.note: str | None = None
        # Set when the job goes on; no more rows are pulled until then.
        self._pause: anyio.Event | None = None
        self.began = 0.0
        self.skipped = 0
        self.counted: int | None = None
        self.saved_input_tokens = 0
        self.saved_output_tokens = 0
        self._pulled = 0
        self._answered = 0
        # Pulled, and waiting for what another row has asked.
        self._waiting = 0
        self._failed = 0
        self._failed_in_a_row = 0
        self._left = 0
        self._failures: dict[str, FailureKind] = {}
        # Rows that were pulled and are not settled yet, in the order of their keys, and when they were.
        self._unsettled: dict[tuple[SQLValue, ...], float] = {}
        self._silence = Unanswered()
        self._last_pulled: tuple[SQLValue, ...] | None = None

    @property
    def elapsed(self) -> float:
        return anyio.current_time() - self.began

    @property
    def in_flight(self) -> int:
        return self._pulled - self._answered - self._waiting

    def pause(self) -> None:
        """Have no more rows pulled until `go_on`."""
        self._pause = self._pause or anyio.Event()

    def go_on(self) -> None:
        """End a pause, if there is one."""
        if self._pause is not None:
            self._pause.set()
            self._pause = None

    async def unpaused(self) -> None:
        """Wait until there is no pause, or the job is to stop."""
        while self._pause is not None and self.stopping is None:
            await self._pause.wait()

    def pull(self, row: Row) -> None:
        self._pulled += 1
        self._last_pulled = row.key
        self._unsettled[row.key] = self.elapsed

    def skip(self, row: Row) -> None:
        """Enter a row that there is nothing to ask about."""
        self.skipped += 1
        self._last_pulled = row.key

    def answer(self, error: Exception | None = None) -> None:
        self._answered += 1
        if error is None:
            self._failed_in_a_row = 0
            return
        self._failed += 1
        self._failed_in_a_row += not concerns_one_row(error)

    def leave(self) -> None:
        """A row was refused with what every other one would be: it is for the next run."""
        self._answered += 1
        self._left += 1

    def submit(self, row: Row) -> None:
        """A row is in a batch: what comes of it is for later."""
        self._answered += 1
        self._left += 1
        self._unsettled.pop(row.key, None)

    def wait(self) -> None:
        """A row that was pulled waits: its question may be on its way already."""
        self._waiting += 1

    def send(self) -> None:
        """The row that came to wait last is sent itself."""
        self._waiting -= 1

    def shared(self, *, failed: bool = False) -> None:
        """A row that waited has what the row that asked the same has got."""
        self._waiting -= 1
        self._answered += 1
        self._failed += failed

    def save(self, answer: Answer) -> None:
        """Enter a row that has its answer without a request."""
        self.saved_input_tokens += answer.input_tokens
        self.saved_output_tokens += answer.output_tokens

    def settle(self, report: EnrichReport, outcome: Outcome) -> None:
        """Enter what a transaction did."""
        report.written += len(outcome.written)
        report.failed += len(outcome.failed)
        report.changed += len(outcome.changed)
        report.reused += sum(result.reused for result in outcome.written)
        report.no_value += sum(result.no_value for result in outcome.written)
        report.in_side_file += len(outcome.set_aside)
        report.lost += len(outcome.lost)
        for results in (outcome.written, outcome.failed, outcome.changed, outcome.set_aside):
            for result in results:
                self._unsettled.pop(result.row.key, None)
        for result in outcome.failed:
            group = group_of(result.error, result.kind)
            known = self._failures.get(group)
            if known is not None:
                known.count += 1
                if len(known.rows) < SHOWN_ROWS:
                    known.rows.append(result.row.key)
            else:
                name = type(result.error).__name__ if result.kind == OTHER else None
                self._failures[group] = FailureKind(
                    result.kind, 1, result.message, result.row.key, name, rows=[result.row.key]
                )

    def is_over(self) -> bool:
        """Say whether no more rows are to be pulled, and remember why."""
        spec = self._spec
        if self.stopping is not None:
            return True
        if spec.limit is not None and self._pulled >= spec.limit:
            return True
        if spec.max_failures is not None and self._failed >= spec.max_failures:
            self.stopping = "max_failures"
        elif spec.max_failures is None and self._failed_in_a_row >= FAILURES_IN_A_ROW:
            self.stopping = "failing"
        elif spec.deadline is not None and self.elapsed >= spec.deadline:
            self.stopping = "deadline"
        elif spec.max_tokens_total is not None and self._tokens_spoken_for() >= spec.max_tokens_total:
            self.stopping = "max_tokens_total"
        elif spec.max_cost is not None and self._cost_spoken_for() >= spec.max_cost:
            self.stopping = "max_cost"
        return self.stopping is not None

    def _cost_spoken_for(self) -> float:
        """Return the dollars spent, and what prompts without a known cost and in flight will have cost."""
        stats = self.model.stats
        priced = stats.succeeded - stats.unpriced
        if stats.cost is None or priced <= 0:
            return 0.0
        cost: float = stats.cost + stats.cost / priced * (stats.unpriced + self.in_flight)
        return cost

    def _tokens_spoken_for(self) -> float:
        """Return the tokens used, and what the prompts in flight will use if they are like the others."""
        stats = self.model.stats
        used: int = stats.input_tokens + stats.output_tokens
        answered = self._answered - self._failed - self._left
        each = used / answered if answered > 0 else 0
        return used + each * self.in_flight

    def message_of(self, error: Exception) -> str:
        """Return an error's text, without the API key should a provider quote it."""
        return redacted(said_by(error)) or "(no message)"

    def update_progress(self, report: EnrichReport) -> None:
        if self.model is None:
            return  # It was stopped before there was a group.
        progress, stats = self.progress, self.model.stats
        progress.total, progress.skipped = report.total, report.skipped
        progress.done, progress.written = report.done, report.written
        progress.failed, progress.changed = report.failed, report.changed
        progress.running = self.in_flight
        progress.retries = stats.retries
        progress.input_tokens, progress.output_tokens = stats.input_tokens, stats.output_tokens
        progress.cost = stats.cost
        progress.elapsed = self.elapsed
        progress.stopping = self.stopping
        progress.paused = self._pause is not None
        progress.waiting = next((str(watch) for watch in self.watches if watch.trouble), None)
        if progress.waiting is None and stats.away is not None:
            progress.waiting = away_in_words(stats.away)
        workers = stats.workers
        if progress.waiting is None and workers is not None and workers.waiting and not workers.workers:
            progress.waiting = f"no worker is there: {workers.waiting} prompts wait for one"
        progress.quota_seconds = stats.quota_seconds
        progress.oldest_seconds = None
        if progress.total is not None and 0 < progress.total - progress.done <= len(self._unsettled):
            progress.oldest_seconds = self.elapsed - next(iter(self._unsettled.values()))
        silence = self._silence.look(progress.done, progress.elapsed)
        told = progress.waiting or progress.quota_seconds is not None or progress.is_tail
        if not told and stats.cooldown_seconds < SHOWN_SECONDS and self.in_flight:
            progress.waiting = silence
        progress.stalled = progress.waiting is not None
        if progress.waiting is None and stats.cooldown_seconds >= SHOWN_SECONDS:
            progress.waiting = f"{math.ceil(stats.cooldown_seconds)} s for the provider"
        if progress.waiting is None:
            progress.waiting = self.note

    def count(self, report: EnrichReport) -> None:
        """Enter what needs no transaction: the rows skipped and, as far as it is known, the total."""
        report.skipped, report.total = self.skipped, self.counted
        if self.counted is not None and self._spec.limit is not None:
            # What is skipped does not use up the limit.
            report.total = min(self.counted, self._spec.limit + self.skipped)

    def close(self, report: EnrichReport) -> None:
        """Complete the report with what is known at the end."""
        report.stopped = self.stopping
        report.trouble = self.trouble
        report.elapsed = self.elapsed
        self.count(report)
        report.cancelled = self.in_flight
        report.saved_input_tokens = self.saved_input_tokens
        report.saved_output_tokens = self.saved_output_tokens
        report.failures = sorted(self._failures.values(), key=lambda kind: -kind.count)
        if self.model is not None:
            stats = self.model.stats
            report.retries = stats.retries
            report.input_tokens, report.output_tokens = stats.input_tokens, stats.output_tokens
            report.cost, report.unpriced = stats.cost, stats.unpriced
            saved = Usage(self.saved_input_tokens, self.saved_output_tokens)
            pricing = getattr(self.model, "pricing", None)
            if report.cost is None and pricing is not None and not stats.unpriced:
                report.cost = (
                    0.0  # Nothing was to be paid for, which is something else than an unknown price.
                )
            if pricing is not None and (saved.input or saved.output):
                report.saved_cost = pricing.cost(saved)

    def resume_where(self, rows: Selection) -> str | None:
        """Return the condition for the rows from the first one on that is not settled."""
        if self._unsettled:
            return rows.from_key(next(iter(self._unsettled)), included=True)
        if self._last_pulled is not None:
            return rows.from_key(self._last_pulled, included=False)
        return None
