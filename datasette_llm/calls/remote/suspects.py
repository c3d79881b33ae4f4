"""Calls under which workers died: which of them is why, where a worker has many at a time.

A worker's death counts against each call that it had. One that lost two is a *suspect*: a worker is given one
suspect at a time, the others wait. When that worker dies too it is that one's fault, and nobody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .line import Line
    from .seat import Call

#: So often a call may lose its worker.
MOST_DEATHS = 3


class CallKillsWorkers(Exception):
    """Each worker that had this call died."""


def is_suspect(call: Call) -> bool:
    """Say whether one more death would be this call's fault."""
    return call.deaths >= MOST_DEATHS - 1


def count_death(left: Sequence[Call]) -> None:
    """Count a worker's death against those that may be why.

    Args:
        left: the calls that it had.
    """
    for call in [each for each in left if is_suspect(each)] or left:
        call.deaths += 1


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
