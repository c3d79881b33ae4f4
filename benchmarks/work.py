"""What one measurement does, and what it found: both travel between processes as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Work:
    """One measurement.

    Attributes:
        way: which of the ways of ``measure.WAYS``.
        n: prompts (or calls, or items).
        concurrency: how many at once; ``None`` leaves it to the package.
        stream: whether answers are streamed.
        readers: how many tasks read each stream at the same time.
        server: settings of the provider.
        config: this package's configuration, besides the model.
        fast: whether this package may use aiohttp, if that is installed.
        look: whether a server's event loop is looked at when it is late.
        backend: ``asyncio`` or ``trio``; filled in by the harness, as is the next.
        url: the provider's address.
    """

    way: str
    n: int
    concurrency: int | None = None
    stream: bool = False
    readers: int = 1
    server: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    fast: bool = True
    look: bool = False
    backend: str = "asyncio"
    url: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Result:
    """What came of it.

    Attributes:
        n: prompts that were asked.
        wall: seconds from the first line of the work to its last.
        cpu: CPU seconds of the process meanwhile.
        right: answers that were exactly what was expected.
        wrong: answers that were not: truncated, or another prompt's.
        failed: prompts that ended in an error.
        errors: the errors' class names.
        peak_mb: the most memory the process had.
        extra: what only this kind of measurement finds.
        server: the provider's counts.
    """

    n: int
    wall: float = 0.0
    cpu: float = 0.0
    right: int = 0
    wrong: int = 0
    failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    peak_mb: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)

    def check(self, text: str, expected: str) -> None:
        """Count an answer as right or wrong."""
        if text == expected:
            self.right += 1
        else:
            self.wrong += 1

    def fail(self, error: BaseException) -> None:
        """Count a prompt that ended in this error."""
        self.failed += 1
        self.errors[type(error).__name__] += 1

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**vars(self), "errors": dict(self.errors)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """Return what ``as_dict()`` was made of."""
        return cls(**(values | {"errors": Counter(values["errors"])}))
