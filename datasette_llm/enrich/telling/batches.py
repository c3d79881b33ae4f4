"""What a run with batches did, and has left to do, in data and in words."""

from __future__ import annotations

from dataclasses import dataclass, field

from .words import counted


@dataclass(slots=True)
class BatchLine:
    """A batch that is not collected yet.

    Attributes:
        id: the provider's; ``None`` if it has none.
        says: its state in the provider's own word.
        requests: how many it has.
        answered: how many of them are.
        expires: when the provider gives up the others.
    """

    id: str | None
    says: str | None
    requests: int
    answered: int
    expires: str | None


@dataclass(slots=True)
class BatchNotes:
    """What a run did with batches.

    Attributes:
        submitted: how many were submitted.
        cancelled: how many were cancelled.
        uncertain: the ids of those that were not, since they may be somebody else's.
        left: those that are not collected yet.
        others: how many batches of other prompts, models or schemas are left in the same columns.
        waiting: why rows were not submitted, if some were not.
        refused: why the provider gave up a batch, if it did.
        odd: result lines that could not be read or belong to no row.
    """

    submitted: int = 0
    cancelled: int = 0
    uncertain: list[str] = field(default_factory=list)
    left: list[BatchLine] = field(default_factory=list)
    others: int = 0
    waiting: str | None = None
    refused: str | None = None
    odd: int = 0

    def lines(
        self, model: str | None, *, submitted: int, inside: int, returned: int, interrupted: bool = False
    ) -> list[str]:
        """Return them as lines for a person.

        Args:
            submitted: rows that were put into batches.
            inside: rows that are in batches.
            returned: rows that came out of them without an answer.
            interrupted: somebody has stopped the job.
        """
        lines = []
        if self.submitted:
            lines.append(f"Submitted {_batches(self.submitted)}, {counted(submitted, 'row')} to {model}")
        if self.cancelled:
            lines.append(
                f"Cancelled {_batches(self.cancelled)}: what was answered before is billed, "
                "and --batch collects it"
            )
        if self.uncertain:
            lines.append(
                f"Not cancelled, since after a crash only size and moment tell that they are ours: "
                f"{', '.join(self.uncertain)}. Cancel them at the provider if you know them"
            )
        if self.waiting:
            lines.append(f"Not all rows were submitted: {self.waiting}")
        if self.left:
            answered, requests = (sum(getattr(each, name) for each in self.left) for name in _COUNTS)
            done = "" if not answered else f", {answered:,} of {counted(requests, 'request')} answered"
            lines.append(
                f"{_batches(len(self.left))} with {counted(inside, 'row')} "
                f"{'is' if len(self.left) == 1 else 'are'} with the provider{done}: "
                "run the same command to collect"
            )
            if interrupted:
                lines.append(
                    "They go on there, and are billed: --batch collects them, --batch-cancel cancels them"
                )
            expires = min((each.expires for each in self.left if each.expires), default=None)
            if expires is not None:
                lines.append(f"What is not answered by {expires} is given up, and not billed")
        elif not self.cancelled and not self.uncertain:
            lines.append("No batch is left to collect")
        if returned:
            lines.append(f"{counted(returned, 'row')} came back without an answer, and can be sent again")
        if self.refused:
            lines.append(f"The provider gave up a batch: {self.refused}")
        if self.odd:
            lines.append(f"{counted(self.odd, 'line')} of the results could not be used")
        if self.others:
            lines.append(
                f"{_batches(self.others)} of another prompt, model or schema are left in these columns: "
                "the command that submitted them collects them"
            )
        return lines


_COUNTS = ("answered", "requests")


def _batches(number: int) -> str:
    return counted(number, "batch", "batches")


def left_in_batches(rows: int) -> str:
    """Return what a live run says of rows that it left alone."""
    are = "is" if rows == 1 else "are"
    return (
        f"{counted(rows, 'row')} {are} in batches and {'was' if rows == 1 else 'were'} left alone: "
        "--batch collects them, --include-submitted asks about them now"
    )
