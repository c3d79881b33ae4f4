"""Failures that are nobody's own: a full line, a provider that is away, or one that refuses all for now.

They use up no attempt of whoever is patient, as a job is.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

import anyio

from .failures import Failure
from .trouble import is_line_full, trouble_of

if TYPE_CHECKING:
    from ..pace.slots import Slots
    from .standing import Standing

#: When to ask whether a failed call failed for everybody, in seconds after the time before: others that were
#: out tell, or those who try next.
VERDICT_SECONDS = (0.0, 0.25, 0.75)
_USED_UP = Failure("hopeless", None, None, "quota")


class Cause(Enum):
    """Why a call failed, as far as that matters for the next one."""

    ITS_OWN = auto()
    #: A line is too long, or the provider is away.
    WEATHER = auto()
    #: Whatever is asked is refused now.
    REFUSED_WITH_ALL = auto()


async def cause_of(error: Exception, failure: Failure, slots: Slots, sent: float, *, last: bool) -> Cause:
    """Say whether a call failed because a line is too long, or a job's as all others do now.

    Args:
        failure: what ``classify()`` says of the error.
        sent: when it was sent, on the event loop's clock.
        last: whether it was the last attempt, for which it pays to ask again a little later.
    """
    trouble = trouble_of(error, failure)
    if is_line_full(error, failure):
        return Cause.WEATHER if slots.waits_for_room() else Cause.ITS_OWN
    if trouble is not None and trouble.silent and slots.waited_in_line(sent):
        return Cause.WEATHER
    if not slots.patience.together or (trouble is None and failure.kind != "throttled"):
        return Cause.ITS_OWN
    alone = trouble is not None and trouble.alone and not trouble.answered
    for seconds in VERDICT_SECONDS if last and not alone else VERDICT_SECONDS[:1]:
        if seconds:
            await anyio.sleep(seconds)
        if trouble is None:
            if slots.nobody_is_served(sent):
                return Cause.REFUSED_WITH_ALL
        elif slots.is_weather(sent, alone=alone):
            return Cause.WEATHER
    return Cause.ITS_OWN


async def wait_with_all(error: Exception, slots: Slots, tokens: int, standing: Standing | None) -> float:
    """Wait for a slot after a refusal that all are given; return for how many seconds.

    Until it is clear that it is all, those go first who have not been refused yet. Cancellation while waiting
    leaves no slot taken.

    Args:
        error: the refusal.
        tokens: an estimate of what the call will use.
        standing: told when nobody was served for so long that there is no point in asking.

    Raises:
        Exception: that refusal, when it counts after all.
    """
    since = slots.now()
    while True:
        with anyio.CancelScope(deadline=slots.unserved_until()):
            await slots.acquire(tokens, first=slots.refuses_all)
            return slots.acquired_at - since
        if slots.now() < slots.unserved_until():
            continue  # Somebody was served meanwhile.
        if slots.refuses_all and standing is not None and standing.refused(error, _USED_UP):
            await standing.wait()
            continue
        raise error
