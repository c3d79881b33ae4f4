"""What came of a row, and of a batch of rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..reading.selection import Row
    from ..sql import SQLValue


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one row: values for its output columns, or an error.

    Attributes:
        question: the hash of what was asked, if it is known.
        no_value: the answer was that there is none: the values are all NULL.
        cost: in dollars, if it is known.
        reused: the values are those of another row, which asked the same.
    """

    row: Row
    values: tuple[SQLValue, ...] | None
    error: Exception | None = None
    kind: str = ""
    message: str = ""
    attempts: int = 1
    question: bytes | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: float | None = None
    no_value: bool = False
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch.

    Attributes:
        written: rows that have their values now.
        failed: rows that have a record of their failure now.
        changed: rows that are gone, were edited, or got a value from somebody else.
        set_aside: rows whose values are in the side file, since the table could not be written.
        lost: rows whose values could be written nowhere.
    """

    written: list[Result] = field(default_factory=list)
    failed: list[Result] = field(default_factory=list)
    changed: list[Result] = field(default_factory=list)
    set_aside: list[Result] = field(default_factory=list)
    lost: list[Result] = field(default_factory=list)
