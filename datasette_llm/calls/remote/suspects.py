"""Calls under which workers died: which of them is why, where a worker has many at a time.

A worker's death counts against each call that it had. One that lost two is a *suspect*: a worker is given one
suspect at a time, the others wait. When that worker dies too it is that one's fault, and nobody else's.

Workers also die of something else: somebody ends them, a machine goes away. That shows when all calls of a
dead worker are answered by others, its death *unexplained*. Where this has happened chance may hit the same
call three times in a large job, and it takes more to be sure.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from .seat import Death

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .line import Line
    from .seat import Call

#: So often a call may lose its worker.
MOST_DEATHS = 3
#: So often where workers died of something else too.
MOST_DEATHS_BY_CHANCE = 6


class CallKillsWorkers(Exception):
    """Each worker that had this call died."""


class Deaths:
    """The deaths of a fleet's workers, and the suspects that wait for a worker that has no other.

    Attributes:
        count: workers that were lost.
        waiting: the suspects.
    """

    def __init__(self) -> None:
        self.count = 0
        self.waiting: deque[Call] = deque()
        self._any_unexplained = False

    def note(self, left: Sequence[Call]) -> None:
        """Count a worker's death against those that may be why.

        Args:
            left: the calls that it had.
        """
        self.count += 1
        death = Death(len(left))
        self._any_unexplained |= not left
        for call in left:
            call.seen_dying += (death,)
        for call in [each for each in left if is_suspect(each)] or left:
            call.deaths += 1

    def answered(self, call: Call) -> None:
        """Note that a worker has survived a call under which others died."""
        for death in call.seen_dying:
            death.unanswered -= 1
            self._any_unexplained |= not death.unanswered

    def is_fault_of(self, call: Call) -> bool:
        """Say whether so many workers died under a call that no other reason is left."""
        return call.deaths >= (MOST_DEATHS_BY_CHANCE if self._any_unexplained else MOST_DEATHS)

    def released(self) -> deque[Call]:
        """Return the suspects that waited: to be placed again, or to hear that there is no hope."""
        waiting, self.waiting = self.waiting, deque()
        return waiting


def is_suspect(call: Call) -> bool:
    """Say whether one more death would be this call's fault."""
    return call.deaths >= MOST_DEATHS - 1


def at_work(lines: Sequence[Line], prompts: Mapping[str, int]) -> list[Line]:
    """Return the workers that have answered something, if there are any.

    One that has not may have to load for seconds what it needs, and be killed before it has answered.

    Args:
        prompts: how many each has answered, by address.
    """
    return [line for line in lines if prompts.get(line.address)] or list(lines)


def without_suspect(lines: Iterable[Line]) -> list[Line]:
    """Return the workers that have no suspect."""
    return [line for line in lines if not any(map(is_suspect, line.in_flight.values()))]
