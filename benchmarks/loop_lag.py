"""How long an event loop's turns are, and what the long ones are made of.

``LoopLag`` wakes up every few milliseconds and notes how late it was: as late as a page's next step would
have been. Asked to, a thread looks at what the loop is doing whenever it is late; and the garbage collector
tells its passes.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections import Counter
from statistics import quantiles
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

#: How often the loop is asked, in seconds.
EVERY_SECONDS = 0.005
#: A turn is long from here on, in seconds.
LONG_SECONDS = 0.02
#: How often a thread looks at a turn that is long, in seconds.
LOOK_SECONDS = 0.002


class LoopLag:
    """Measures the running event loop until ``run()`` is cancelled.

    Args:
        look: whether a thread looks at long turns. It takes CPU itself.
    """

    def __init__(self, *, look: bool = False) -> None:
        self._look = look
        self._late: list[float] = []
        self._due = 0.0
        self._stacks: Counter[str] = Counter()
        self._collected: list[tuple[int, float]] = []
        self._collecting_since = 0.0

    def reset(self) -> None:
        """Begin anew."""
        self._late, self._stacks, self._collected = [], Counter(), []

    @property
    def figures(self) -> dict[str, Any]:
        """How late the loop was, in milliseconds; the collector's passes; what long turns did."""
        late = sorted(self._late) or [0.0]
        collected: dict[str, dict[str, float]] = {}
        for generation, seconds in self._collected:
            found = collected.setdefault(str(generation), {"passes": 0, "ms": 0.0, "longest_ms": 0.0})
            found["passes"] += 1
            found["ms"] += seconds * 1000
            found["longest_ms"] = max(found["longest_ms"], seconds * 1000)
        return {
            "p50_ms": late[len(late) // 2] * 1000,
            "p99_ms": (quantiles(late, n=100)[98] if len(late) > 1 else late[0]) * 1000,
            "longest_ms": late[-1] * 1000,
            "long_turns": sum(seconds >= LONG_SECONDS for seconds in late),
            "collector": collected,
            "doing": dict(self._stacks.most_common(40)),
        }

    async def run(self) -> None:
        """Measure; ends by being cancelled."""
        gc.callbacks.append(self._tell)
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(threading.get_ident(), stop), daemon=True)
        if self._look:
            watcher.start()
        try:
            while True:
                self._due = time.perf_counter() + EVERY_SECONDS
                await asyncio.sleep(EVERY_SECONDS)
                self._late.append(max(0.0, time.perf_counter() - self._due))
        finally:
            self._due = 0.0
            stop.set()
            gc.callbacks.remove(self._tell)

    def _tell(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._collecting_since = now
        else:
            self._collected.append((info["generation"], now - self._collecting_since))

    def _watch(self, thread: int, stop: threading.Event) -> None:
        while not stop.wait(LOOK_SECONDS):
            due = self._due
            if due and time.perf_counter() - due > LONG_SECONDS:
                frame = sys._current_frames().get(thread)
                if frame is not None:
                    self._stacks[_what(frame)] += 1


def _what(frame: FrameType | None) -> str:
    """The package that runs, and through which of this package's functions it came to that."""
    inner = frame.f_globals.get("__name__", "?").partition(".")[0] if frame else "?"
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("datasette.", "datasette_llm.", "uvicorn.")):
            return f"{module}.{frame.f_code.co_name} > {inner}"
        frame = frame.f_back
    return f"the loop > {inner}"
