"""What a job works with once its group is open, and what a way to have its rows answered offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from .ledger import Ledger
    from .plan import Plan
    from .spec import JobSpec
    from .telling.report import EnrichReport
    from .writing.llm_log import LlmLog
    from .writing.recorder import Recorder
    from .writing.results import Outcome
    from .writing.writer import Writer


@dataclass(frozen=True, slots=True)
class Ground:
    """What a job works with, once its group is open."""

    plan: Plan
    model: Any
    writer: Writer
    ledger: Ledger
    report: EnrichReport
    recorder: Recorder | None
    stop: Callable[..., None]
    log: LlmLog | None = None


class Way(Protocol):
    """A way to have rows answered that is not one prompt after the other.

    Attributes:
        asks: whether rows that wait are asked about, beside what has been sent before.
    """

    asks: bool

    def open_group(self, spec: JobSpec) -> AbstractAsyncContextManager[Any]:
        """Open the group that the prompts belong to."""
        ...

    async def has_work(self, plan: Plan) -> bool:
        """Say whether there is something to do although no row waits."""
        ...

    def settled(self, outcome: Outcome) -> None:
        """Called with what each transaction did."""

    async def run(self, ground: Ground) -> None:
        """Have the rows answered; returns when nothing more is to be done now."""
        ...
