"""One worker, as the fleet sees it: what it was given, what it is told next, what it tells."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from . import identity
from .bench import BUSY, LEASE_SECONDS
from .questions import packed, unpacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .key_offers import KeyOffer
    from .seat import Call

logger = logging.getLogger("datasette_llm")

#: Seconds without an answer after which a worker is taken for dead: then it has cancelled its calls.
SILENCE_SECONDS = LEASE_SECONDS + 1.0
#: With so many calls in flight, what is sent waits a moment for more to go along.
MOMENT_SECONDS = 0.002
#: Silence is counted in looks so far apart: a process that stood still itself has not listened.
LOOK_SECONDS = 0.5
GOODBYE_SECONDS = 1.0


class UnfitWorker(Exception):
    """A worker that cannot work for this coordinator, now or later."""


class Link(Protocol):
    """What carries bytes to one worker's bench and back.

    Attributes:
        private: whether nobody else can read what it carries.
    """

    private: bool

    async def ask(self, request: bytes) -> bytes: ...

    async def send(self, parcel: bytes) -> None: ...

    async def poll(self, acknowledged: int) -> bytes: ...

    async def aclose(self) -> None: ...


class Client(Protocol):
    """Who is told of calls that end, and of those that somebody else has to make."""

    def answered(self, line: Line, call: Call) -> None: ...

    def submit(self, call: Call) -> None: ...


class Line:
    """One worker and the calls it has.

    Attributes:
        in_flight: its calls, by the number that it knows them by.
        unfit: models that it cannot be asked for, and why.
        closing: whether it is given nothing more.
        ended: whether it said that it ends, and did not die.
    """

    def __init__(self, address: str, link: Link, client: Client) -> None:
        self.address = address
        self.in_flight: dict[int, Call] = {}
        self.unfit: dict[str, str] = {}
        self.closing = False
        self.ended = False
        self._link = link
        self._client = client
        self._quiet = 0
        self._number = 0
        self._parcel: list[tuple[int, Call]] = []
        self._cancelled: list[int] = []
        self._stirred = anyio.Event()
        self._scope = anyio.CancelScope()
        self._checked: set[str] = set()
        self._keys: dict[str, str | None] = {}

    async def greet(self) -> str | None:
        """Ask who it is. Returns why it cannot be used, if so."""
        return identity.unfit((await self._ask({"hello": True}))["hello"])

    async def check(self, model: Mapping[str, Any]) -> str | None:
        """Ask whether its model is the same. Returns what is wrong with it, if anything is."""
        if model["id"] not in self._checked:
            why = (await self._ask({"model": model}))["differs"]
            self._checked.add(model["id"])
            if why is not None:
                self.unfit[model["id"]] = why
        return self.unfit.get(model["id"])

    async def offer(self, key: KeyOffer) -> str | None:
        """See that it can send with a key. Returns why it cannot, if so."""
        if key.reference not in self._keys:
            why: str | None = None
            if key.reference not in (await self._ask({"keys": {key.reference: key.told()}}))["keys"]:
                if self._link.private:
                    await self._ask({"values": {key.reference: key.value}})
                else:
                    why = (
                        "it does not have the key, which cannot be sent to it in the open: "
                        "give it the key, or use a scheduler with TLS (tls://...)"
                    )
            self._keys[key.reference] = why
        return self._keys[key.reference]

    async def _ask(self, request: dict[str, Any]) -> Any:
        answer = unpacked(await self._link.ask(packed(request)))
        self._quiet = 0
        return answer

    async def run(self) -> None:
        """Send calls and receive what comes of them, until it is gone, given up or ended."""
        self._quiet = 0
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._send)
                    tasks.start_soon(self._receive)
                    tasks.start_soon(self._watch)
        finally:
            self.closing = True
            await self.say_goodbye()

    async def _watch(self) -> None:
        while self._quiet * LOOK_SECONDS < SILENCE_SECONDS:
            await anyio.sleep(LOOK_SECONDS)
            self._quiet += 1
        logger.debug("The worker %s has said nothing for %g seconds", self.address, SILENCE_SECONDS)
        self.give_up()

    async def say_goodbye(self) -> None:
        """Let go of it. Never raises, never hangs."""
        with anyio.move_on_after(GOODBYE_SECONDS, shield=True):
            try:
                await self._link.aclose()
            except Exception as error:
                logger.debug("The worker %s was left as it is: %s", self.address, error)

    def give_up(self) -> None:
        """Take it for gone."""
        self.closing = True
        self._scope.cancel()

    def take_back(self) -> list[Call]:
        """Return the calls that it has not answered."""
        left = list(self.in_flight.values())
        self.in_flight.clear()
        for call in left:
            call.line = None
        return [call for call in left if not call.over]

    def put(self, call: Call) -> None:
        """Give it a call."""
        self._number += 1
        call.line, call.number, call.worker = self, self._number, self.address
        self.in_flight[self._number] = call
        self._parcel.append((self._number, call))
        self._stirred.set()

    def cancel(self, call: Call) -> None:
        """Have it cancel a call."""
        if self.in_flight.pop(call.number, None) is not None:
            call.line = None
            self._cancelled.append(call.number)
            self._stirred.set()

    async def _send(self) -> None:
        while True:
            await self._stirred.wait()
            if len(self.in_flight) >= BUSY:
                await anyio.sleep(MOMENT_SECONDS)
            self._stirred = anyio.Event()
            cancelled, self._cancelled = self._cancelled, []
            calls, self._parcel = self._parcel, []
            withdrawn = set(cancelled)
            asked = [
                (number, call.question)
                for number, call in calls
                if number not in withdrawn and await self._has_key(number, call)
            ]
            parcel: dict[str, Any] = {"calls": asked}
            if cancelled:
                parcel["cancel"] = cancelled
            try:
                await self._link.send(packed(parcel))
            except Exception as error:
                logger.debug("The worker %s took nothing: %s", self.address, error)
                self.give_up()
                return

    async def _has_key(self, number: int, call: Call) -> bool:
        if call.key is None or self._keys.get(call.key.reference, "?") is None:
            return True
        try:
            why = await self.offer(call.key)
        except Exception as error:
            logger.debug("The worker %s was not told of a key: %s", self.address, error)
            self.give_up()
            return False
        if why is not None and self.in_flight.pop(number, None) is not None:
            call.line = None
            if call.model_id not in self.unfit:
                logger.warning("Not used for %s: worker %s: %s", call.model_id, self.address, why)
            self.unfit[call.model_id] = why
            self._client.submit(call)
        return why is None

    async def _receive(self) -> None:
        batch = 0
        while True:
            try:
                content = await self._link.poll(batch)
            except Exception as error:
                logger.debug("The worker %s does not answer: %s", self.address, error)
                self.give_up()
                return
            self._quiet = 0
            told = unpacked(content)
            if told["batch"] > batch:
                batch = told["batch"]
                self._hand_over(told["told"])
            if told["ended"]:
                self.ended = True
                self.give_up()
                return

    def _hand_over(self, told: list[Any]) -> None:
        for number, kind, value in told:
            call = self.in_flight.get(number)
            if call is None:
                continue
            if kind == "events":
                call.heard = True
            else:
                del self.in_flight[number]
                call.line = None
                self._client.answered(self, call)
            call.hand(kind, value)
