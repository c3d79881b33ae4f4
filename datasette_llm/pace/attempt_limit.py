"""How long one attempt may take, learnt from answers: one that never comes back must not keep a job.

Far beyond what is usual, so that nothing is cut that only takes long. It also holds for the calls that were
sent before anything was learnt: each of them is in a cancel scope whose deadline is kept up to date.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import anyio

#: No attempt is given up sooner, in seconds.
LEAST_SECONDS = 120.0
#: So many times as long as the slowest of a hundred answers.
TIMES, SLOWEST = 10.0, 0.01
#: By what share of that a streamed answer that has become silent may be given up later.
LATE = 0.05
#: Answers before anything is known, after how many it is looked at again, and how many count.
ENOUGH, EVERY, MOST = 20, 20, 1000


class AttemptLimit:
    """The limit for the calls of one owner.

    Attributes:
        seconds: how long an attempt may take now; ``inf`` until enough is known.
    """

    __slots__ = ("_answers", "_running", "_seen", "seconds")

    def __init__(self) -> None:
        self.seconds = math.inf
        self._seen = 0
        self._answers: deque[float] = deque(maxlen=MOST)
        self._running: dict[anyio.CancelScope, float] = {}

    def watch(self, scope: anyio.CancelScope, now: float) -> None:
        """Give a call's scope its deadline, counted from now; again whenever something of its answer came."""
        self._running[scope] = now
        deadline = now + self.seconds
        if scope.deadline == math.inf:
            if deadline < math.inf:
                scope.deadline = deadline
        elif scope.deadline < deadline:
            # Not each time: that costs a timer, and a streamed answer is heard of a hundred times a second.
            scope.deadline = deadline + LATE * self.seconds

    def forget(self, scope: anyio.CancelScope) -> None:
        """A call has ended, or has no deadline for a while; may be said again."""
        self._running.pop(scope, None)

    def answered(self, seconds: float) -> None:
        """An answer took so long; of a streamed one, the longest silence counts."""
        self._answers.append(seconds)
        self._seen += 1
        if self._seen < ENOUGH or self._seen % EVERY:
            return
        limit = LEAST_SECONDS
        # Most often no order is needed to see that.
        if TIMES * max(self._answers) > LEAST_SECONDS:
            slowest = sorted(self._answers)[-max(1, round(SLOWEST * len(self._answers)))]
            limit = max(LEAST_SECONDS, TIMES * slowest)
        if limit != self.seconds:
            self.seconds = limit
            for scope, since in self._running.items():
                scope.deadline = since + limit
