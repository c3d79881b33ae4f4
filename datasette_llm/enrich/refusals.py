"""What a provider refuses all rows alike: not their failure, and no reason to try the next one.

Two ways to find out. The group knows what no prompt can escape by what providers are known to say
(`datasette_llm.calls.refusals`). Such words will never be complete, so a job whose first rows all get one
and the same refusal stops just so. Until that is decided those rows' results are held back: either way
what is recorded is true.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from datasette_llm.calls.failures import classify, refusal_of, words_of

if TYPE_CHECKING:
    from datasette_llm.calls.refusals import Reason
    from datasette_llm.calls.standing import Refusal

    from .telling.stopped import RefusedReason
    from .writing.results import Result

#: So many first rows, refused alike, stop a job.
ROWS_ALIKE = 10

STOP_REASONS: dict[Reason, RefusedReason] = {
    "key": "key_refused",
    "money": "no_money",
    "model": "no_model",
    "quota": "quota",
}

#: Parts of a refusal that differ though it is the same: identifiers of the request, and moments. Nothing
#: else is passed over: what a refusal says of a row's own content or length is to tell it from the others.
_PASSING = re.compile(
    r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"
    r"|\b(?:req|request|chatcmpl|resp|msg|cf-ray)[-_][\w-]{6,}"
    r"|\b(?=\w*\d)(?=\w*[a-z])\w{16,}\b"
    r"|\b\d{4}-\d\d-\d\d[t ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:z|[+-]\d\d:?\d\d)?"
)


def normalised(words: str) -> str:
    """Return a refusal's words without what differs from one request to the next in any case."""
    return " ".join(_PASSING.sub("*", words.lower()).split())


class Refusals:
    """The refusals of one job, held back as long as they may be everybody's.

    Attributes:
        alike: what the first rows were all refused with, once there were enough of them.
    """

    def __init__(self, *, tolerant: bool) -> None:
        """Begin a job.

        Args:
            tolerant: it has been told how many failures to bear: that first rows are alike is no reason.
        """
        self.alike: str | None = None
        self.held: list[Result] = []
        self._undecided = not tolerant
        self._first: tuple[int | None, str] | None = None

    def failed(self, result: Result) -> list[Result]:
        """Take a row's failure; return the results that are to be recorded now."""
        error = result.error
        refusal = refusal_of(error) if error is not None and result.attempts else None
        likeness = None if refusal is None else (refusal[0], normalised(refusal[1]))
        if self.alike is not None:
            # It was on its way.
            return [] if likeness == self._first else [result]
        if self._undecided and likeness is not None and self._first in (None, likeness):
            return self._one_more_alike(result, likeness)
        if error is not None and classify(error).kind == "hopeless":
            # Of a key that has worked, say: the next ones will show whether that is over.
            self.held.append(result)
            return []
        return [*self.decide(), result]

    def _one_more_alike(self, result: Result, likeness: tuple[int | None, str]) -> list[Result]:
        self._first = likeness
        self.held.append(result)
        if len(self.held) == ROWS_ALIKE and result.error is not None:
            self.alike = words_of(result.error)
            self.held.clear()
        return []

    def decide(self) -> list[Result]:
        """A row was answered, or refused otherwise: what is held was the rows' own, and is returned."""
        self._undecided = False
        held, self.held = self.held, []
        return held


def stop_reason(refusal: Refusal | None, error: Exception) -> RefusedReason | None:
    """Say why a job stops after a row's failure, if no other row could succeed.

    Args:
        refusal: what the group's further prompts are refused with.
        error: the row's.
    """
    if refusal is None:
        return None
    if error is not refusal.error and classify(error).kind not in ("hopeless", "throttled"):
        return None  # It was on its way, and has a failure of its own.
    return STOP_REASONS[refusal.reason]
