"""The supervisor of a group: owns its prompts, and what they share.

`group_block` enters and leaves it; `group.Group` is what plugins see of it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..calls.batches.offline import NotOfflineError
from ..calls.metrics import is_measured
from ..calls.standing import Standing
from ..calls.tracing import is_traced
from ..errors import GroupClosed, PromptCancelled
from ..pace.descriptors import fitting
from ..pace.registry import get_throttle
from .entry_gate import EntryGate
from .group import Group
from .stats import GroupStats
from .supervisor import GRACE_SECONDS, Supervisor

if TYPE_CHECKING:
    from ..calls.batches.offline import Offline
    from ..calls.choice import Choice
    from ..calls.standing import Refusal
    from ..pace.policy import ConcurrencyBounds, Patience
    from ..responses.response import PromptResponse

logger = logging.getLogger("datasette_llm")

#: How many failed prompts a group remembers to say so if nobody reads them.
FAILURES_KEPT = 1_000
#: How many of those it logs one by one.
FAILURES_LOGGED = 10


class Stoppable(Protocol):
    """A map that runs in a group."""

    def stop(self) -> None: ...


class GroupSupervisor(Supervisor):
    """Owns the prompts of one group.

    Attributes:
        group: what hooks see of it.
        slots: bound its model calls in flight.
    """

    def __init__(
        self,
        datasette: Any,
        choice: Choice,
        *,
        concurrency: int | ConcurrencyBounds | None = None,
        on_error: Literal["collect", "cancel"] = "collect",
        grace_seconds: float = GRACE_SECONDS,
        wait_for_quota: float = 0.0,
        patience: Patience | None = None,
        offline: Offline | None = None,
    ) -> None:
        super().__init__(grace_seconds=grace_seconds)
        self.choice = choice
        self.group: Group = Group(choice, self._stats)
        self.gate = EntryGate()
        throttle = get_throttle(choice.key, choice.model_id, choice.settings, choice.key_name)
        self.slots = throttle.slots(
            fitting(choice.settings.concurrency if concurrency is None else concurrency),
            patience=patience,
            urgent=bool(choice.settings.interactive),
        )
        if choice.workers is not None and offline is None:
            # What the prompts of this group share is somewhere else: its model's calls are made there.
            from ..calls.remote.proxy import RemotePool

            self.clients = RemotePool(choice.workers)
        if offline is not None:
            self.call_type = offline.call_type
        if not self.clients.adopt(choice.model, offline or throttle.observe) and offline is not None:
            raise NotOfflineError(f"the model {choice.model_id!r} makes its clients in a way of its own")
        self.datasette = datasette
        self._on_error = on_error
        self._began = self.now()
        self._elapsed: float | None = None
        self._failed: list[PromptResponse] = []
        self._errors: list[Exception] = []
        self._maps: dict[Stoppable, None] = {}
        self._traced = is_traced()
        self._measured = is_measured()
        self._wait_for_quota = wait_for_quota
        self._standings: dict[str | None, Standing] = {}

    @property
    def traced(self) -> bool:
        return self._traced  # Asked once, not for each of a hundred thousand prompts.

    @property
    def measured(self) -> bool:
        return self._measured

    def _stats(self) -> GroupStats:
        counters = self.counters
        elapsed = self.now() - self._began if self._elapsed is None else self._elapsed
        ended = counters.succeeded + counters.failed + counters.cancelled
        return GroupStats(
            waiting=counters.waiting,
            running=counters.running,
            succeeded=counters.succeeded,
            failed=counters.failed,
            cancelled=counters.cancelled,
            retries=counters.retries,
            throttled_seconds=self.slots.throttled_seconds,
            input_tokens=counters.input_tokens,
            output_tokens=counters.output_tokens,
            elapsed=elapsed,
            prompts_per_second=ended / elapsed if elapsed > 0 else 0.0,
            concurrency=self.slots.limit,
            away=self.slots.away(),
            quota_seconds=self._quota_seconds(),
            cooldown_seconds=self.slots.cooldown_seconds(),
            cost=counters.cost,
            unpriced=counters.unpriced,
            workers=self.clients.figures,
        )

    def _quota_seconds(self) -> float | None:
        now = self.now()
        waits = [standing.until - now for standing in self._standings.values() if standing.waiting]
        return max(waits, default=None)

    def check_open(self) -> None:
        """Raise if no prompt can be asked of this group any more.

        Raises:
            GroupClosed: its block has been left.
            PromptCancelled: it has been cancelled.
        """
        if self.group.closed:
            raise GroupClosed("the group's block has been left; open another group for more prompts")
        if self._cancelled:
            raise PromptCancelled("the group has been cancelled")

    def cancel(self) -> None:
        super().cancel()
        for running in list(self._maps):
            running.stop()

    def prompt_failed(self, error: Exception) -> None:
        if self._on_error == "cancel" and not self._cancelled:
            self._errors.append(error)
            self.cancel()
            if self._tasks is not None:
                # The body is waiting for an answer that will not come.
                self.at_home(self._tasks.cancel_scope.cancel)
        elif self._on_error == "cancel":
            self._errors.append(error)

    def standing(self, key: str | None) -> Standing:
        """Return how prompts with this key stand; most groups have one key."""
        standing = self._standings.get(key)
        if standing is None:
            standing = self._standings[key] = Standing(self.choice.model_id, self._wait_for_quota)
        return standing

    @property
    def refusal(self) -> Refusal | None:
        """What further prompts are refused with, once no prompt can succeed."""
        refusals = (standing.refusal for standing in self._standings.values())
        return next((refusal for refusal in refusals if refusal is not None), None)

    def watch_failure(self, response: PromptResponse) -> None:
        """Remember a failed response, to say at the end that nobody read it."""
        if len(self._failed) >= FAILURES_KEPT:
            self._failed = [kept for kept in self._failed if not kept._error_seen]
        if len(self._failed) < FAILURES_KEPT:
            self._failed.append(response)

    def _log_unread_failures(self) -> None:
        unread = [
            response
            for response in self._failed
            # Those that the block is left with are not lost.
            if not response._error_seen and response._error not in self._errors
        ]
        for response in unread[:FAILURES_LOGGED]:
            error = response._error
            logger.warning(
                "A prompt to %s failed and nobody read it: %s: %s",
                self.choice.model_id,
                type(error).__name__,
                error,
            )
        if len(unread) > FAILURES_LOGGED:
            logger.warning("and %d more prompts that nobody read", len(unread) - FAILURES_LOGGED)
