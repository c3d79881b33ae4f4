"""Where calls come from: the event loop of the prompts' owner, as the fleet sees it, and the reverse."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from ...backends.loops import LoopDoor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .key_offers import KeyOffer


class Fleet(Protocol):
    """Who has calls made; all but `tell()` is for its own loop."""

    def tell(self, what: Callable[[], object]) -> None: ...

    def submit(self, call: Call) -> None: ...

    def withdraw(self, call: Call) -> None: ...

    def prepare(self, readiness: Readiness) -> None: ...


class Holder(Protocol):
    """A worker that has a call."""

    def cancel(self, call: Call) -> None: ...


class Seat:
    """One event loop's access to a fleet, which may live on another one. Made on the loop that asks."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._door = LoopDoor()
        self._arrived: deque[Callable[[], object]] = deque()
        self._told = False

    def ask(self, model_id: str, question: Mapping[str, Any], key: KeyOffer | None) -> Call:
        """Have some worker make a call; returns at once."""
        call = Call(self, model_id, question, key)
        self.fleet.tell(call.submit)
        return call

    async def prepare(self, model: Mapping[str, Any], key: KeyOffer | None) -> None:
        """Wait until there is a worker that can be asked for a model.

        Raises:
            WorkersError: there are only others, for the reasons it tells.
            NoWorkers: there is none in time.
        """
        readiness = Readiness(self, model, key)
        self.fleet.tell(lambda: self.fleet.prepare(readiness))
        await readiness.wait()

    def tell(self, what: Callable[[], object]) -> None:
        """Have the loop of this seat call a function soon, together with what else it is told."""
        self._arrived.append(what)
        if not self._told:
            self._told = True
            self._door.call_soon(self._hear)

    def _hear(self) -> None:
        self._told = False
        while self._arrived:
            self._arrived.popleft()()


@dataclass(eq=False)
class Death:
    """A worker's death.

    Attributes:
        unanswered: how many of its calls have not been answered since, those that failed among them.
    """

    unanswered: int


class Call:
    """One call, from its prompt's task to a worker and back.

    ``receive()`` and ``withdraw()`` belong to the loop of its seat, the rest to the fleet's.

    Attributes:
        heard: whether a part of the answer has come.
        deaths: workers that died while they had it, and whose death may be its fault.
        seen_dying: all deaths of workers that had it.
        waits: whether it waits for a worker.
        over: whether it is answered, has failed or is not wanted any more.
        worker: who had it last.
    """

    __slots__ = (
        "_arrived", "_messages", "_seat", "deaths", "heard", "key", "line", "model_id", "number", "over",
        "question", "seen_dying", "waits", "worker",
    )  # fmt: skip

    def __init__(self, seat: Seat, model_id: str, question: Mapping[str, Any], key: KeyOffer | None) -> None:
        self._seat = seat
        self._messages: deque[tuple[str, Any]] = deque()
        self._arrived: anyio.Event | None = None
        self.model_id = model_id
        self.question = question
        self.key = key
        self.line: Holder | None = None
        self.number = 0
        self.deaths = 0
        self.seen_dying: tuple[Death, ...] = ()
        self.heard = False
        self.waits = False
        self.over = False
        self.worker: str | None = None

    def submit(self) -> None:
        self._seat.fleet.submit(self)

    def let_wait(self, waits: bool) -> None:
        """Tell its prompt that it waits for a worker, or does so no more."""
        if waits != self.waits:
            self.waits = waits
            self._seat.tell(lambda: self._arrive("waits" if waits else "goes", None))

    def hand(self, kind: str, value: Any) -> None:
        """Hand over what a worker told."""
        if kind != "events":
            self.over = True
        self._seat.tell(lambda: self._arrive(kind, value))

    def fail(self, error: Exception) -> None:
        """Have it fail, without a worker's word."""
        self.hand("lost", error)

    def _arrive(self, kind: str, value: Any) -> None:
        self._messages.append((kind, value))
        if self._arrived is not None:
            self._arrived.set()

    async def receive(self) -> tuple[str, Any]:
        """Return the next thing that was told of it."""
        if not self._messages:
            self._arrived = anyio.Event()
            await self._arrived.wait()
            self._arrived = None
        return self._messages.popleft()

    def withdraw(self) -> None:
        """Have it cancelled if it is not over; returns at once."""
        if not self.over:
            self.over = True
            self._seat.fleet.tell(lambda: self._seat.fleet.withdraw(self))


class Readiness:
    """Somebody waits to hear whether calls to a model can be made."""

    def __init__(self, seat: Seat, model: Mapping[str, Any], key: KeyOffer | None) -> None:
        self.model = model
        self.key = key
        self._seat = seat
        self._known = anyio.Event()
        self._error: Exception | None = None

    def accept(self) -> None:
        self._seat.tell(self._known.set)

    def refuse(self, error: Exception) -> None:
        self._error = error
        self.accept()

    async def wait(self) -> None:
        await self._known.wait()
        if self._error is not None:
            raise self._error
