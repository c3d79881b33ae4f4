"""A worker's side: takes calls as they come, makes them on its own event loop, hands out what came of them.

Whoever asks is heard of at least once in a lease: a parcel, or the poll that waits for results. When the
lease is over nobody wants the answers any more: what runs is cancelled, and its connections closed.
"""

from __future__ import annotations

import copy
import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio
import llm
from opentelemetry import context as tracing_context
from opentelemetry import propagate

from ...backends.loops import loop_clock
from ...secrecy import keep_secret, redacted
from ..clients.pool import ClientPool
from ..driving import drive
from . import answers, identity, key_offers
from .flown_errors import flight_of
from .questions import conversation_from, packed, prompt_from, unpacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anyio.abc import TaskStatus

logger = logging.getLogger("datasette_llm")

#: Seconds without a word after which whoever asked is taken for gone.
LEASE_SECONDS = 5.0
LOOKS = 10
#: How long a poll waits for a result; half of that and the lease is renewed in time.
POLL_SECONDS = 1.0
#: With so many calls running, a poll waits a moment for other results to go along.
BUSY = 16
MOMENT_SECONDS = 0.004
#: Headers that say something about the pace, or the price; the others stay here.
_TELLING = ("ratelimit", "rate-limit", "retry-after", "x-litellm-response-cost", "x-should-retry")

_call: ContextVar[Any] = ContextVar("datasette_llm_remote_call", default=None)


class _Call:
    """One call that runs."""

    __slots__ = ("headers", "number", "scope")

    def __init__(self, number: int) -> None:
        self.number = number
        self.scope = anyio.CancelScope()
        self.headers: list[tuple[int, dict[str, str], float, float]] = []


class Bench:
    """Makes the calls of one coordinator. Everything here runs on one event loop.

    Args:
        lease: seconds without a word after which everything is cancelled.
    """

    def __init__(self, lease: float = LEASE_SECONDS) -> None:
        self._lease = lease
        self._clock = loop_clock()
        self._quiet = 0
        self._calls: dict[int, _Call] = {}
        self._models: dict[tuple[str, str | None], Any] = {}
        self._keys: dict[str, str] = {}
        self._pool = ClientPool()
        self._ready: list[bytes] = []
        self._batch = 0
        self._unacknowledged: list[bytes] = []
        self._stirred = anyio.Event()
        self._begun = 0
        self._ended = anyio.Event()
        self._tasks: Any = None

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Work until the lease is over or `end()` is called; then nothing is left running."""
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                self._quiet = 0
                task_status.started()
                with anyio.CancelScope() as watching:
                    tasks.start_soon(self._end_with, watching)
                    await self._lease_is_over()
                    if self._calls:
                        logger.warning(
                            "Nobody has asked for the answers of %d calls for %g seconds: they are cancelled",
                            len(self._calls),
                            self._lease,
                        )
                tasks.cancel_scope.cancel()
        finally:
            self._ended.set()
            self._stir()
            await self._pool.aclose()

    async def _lease_is_over(self) -> None:
        # Counted in looks: a process that stood still has not listened, and finds the words waiting for it.
        while self._quiet < LOOKS:
            await anyio.sleep(self._lease / LOOKS)
            self._quiet += 1

    async def _end_with(self, scope: anyio.CancelScope) -> None:
        await self._ended.wait()
        scope.cancel()

    def end(self) -> None:
        """Cancel what runs, and have `run()` return."""
        self._ended.set()

    def ask(self, content: bytes) -> bytes:
        """Answer what is asked before calls are sent: who this is, what it can do, which keys it has."""
        request = unpacked(content)
        told: dict[str, Any] = {}
        if "hello" in request:
            told["hello"] = identity.of_this_process()
        if "model" in request:
            told["differs"] = identity.difference(request["model"])
        if "keys" in request:
            for reference, offer in request["keys"].items():
                own = key_offers.found(offer)
                if own is not None:
                    self._keys[reference] = own
            told["keys"] = [reference for reference in request["keys"] if reference in self._keys]
        for reference, value in request.get("values", {}).items():
            keep_secret(value)
            self._keys[reference] = value
        # Loading llm's plugins may have taken seconds.
        self._quiet = 0
        return packed(told)

    def take(self, content: bytes) -> None:
        """Begin the calls of a parcel, and cancel those it names."""
        self._quiet = 0
        parcel = unpacked(content)
        for number, asked in parcel.get("calls", ()):
            # One that comes a second time was lost on the way back, not on the way here.
            if number not in self._calls and number > self._begun:
                self._begun = number
                call = self._calls[number] = _Call(number)
                self._tasks.start_soon(self._make, call, asked)
        for number in parcel.get("cancel", ()):
            call_or_none = self._calls.get(number)
            if call_or_none is not None:
                call_or_none.scope.cancel()

    async def poll(self, acknowledged: int) -> bytes:
        """Wait for results, and return them all.

        Args:
            acknowledged: the number of the last batch that arrived; one that did not is returned again.
        """
        self._quiet = 0
        if acknowledged < self._batch and self._unacknowledged:
            return self._told()
        self._unacknowledged = []
        if not self._ready and not self._ended.is_set():
            with anyio.move_on_after(POLL_SECONDS):
                await self._stirred.wait()
        if len(self._calls) >= BUSY:
            await anyio.sleep(MOMENT_SECONDS)
        self._quiet = 0
        self._stirred = anyio.Event()
        if self._ready:
            self._batch += 1
            self._unacknowledged, self._ready = self._ready, []
        return self._told()

    def _told(self) -> bytes:
        ended = b"true" if self._ended.is_set() else b"false"
        told = b",".join(self._unacknowledged)
        return b'{"batch":%d,"ended":%s,"told":[%s]}' % (self._batch, ended, told)

    def _say(self, number: int, kind: str, value: Any) -> None:
        self._ready.append(packed([number, kind, value]))
        self._stir()

    def _stir(self) -> None:
        if not self._stirred.is_set():
            self._stirred.set()

    async def _make(self, call: _Call, asked: Mapping[str, Any]) -> None:
        _call.set(call)
        trace = asked.get("trace")
        if trace:
            tracing_context.attach(propagate.extract(trace))
        try:
            with call.scope:
                await self._answer(call, asked)
        finally:
            self._calls.pop(call.number, None)

    async def _answer(self, call: _Call, asked: Mapping[str, Any]) -> None:
        observed: llm.AsyncResponse | None = None
        sent = 0

        def publish(event: Any) -> None:
            nonlocal sent
            self._say(call.number, "events", answers.events_of([event], first=sent == 0))
            sent += 1

        try:
            model, key = self._model(asked["model"], asked.get("key"))
            observed = llm.AsyncResponse(
                prompt_from(asked, model),
                model,
                stream=asked["stream"],
                conversation=conversation_from(asked, model),
                key=key,
            )
            await drive(observed, publish)
            told = answers.answer_of(observed, sent)
            if call.headers:
                told["headers"] = self._aged(call)
            self._say(call.number, "done", told)
        except Exception as error:
            failed = {"error": _without_keys(flight_of(error)), "headers": self._aged(call)}
            self._say(call.number, "failed", failed)

    def _aged(self, call: _Call) -> list[list[Any]]:
        now = self._clock()
        return [[status, headers, age, now - seen] for status, headers, age, seen in call.headers]

    def _model(self, model_id: str, reference: str | None) -> tuple[Any, str | None]:
        key = None if reference is None else self._keys[reference]
        model: Any = self._models.get((model_id, reference))
        if model is None:
            model = copy.copy(llm.get_async_model(model_id))
            if key is not None and (not isinstance(model, llm.AsyncKeyModel) or model.key is not None):
                model.key = key if not isinstance(model, llm.AsyncKeyModel) else None
            self._pool.adopt(model, self._observe)
            self._models[model_id, reference] = model
        return model, key

    def _observe(self, status: int, headers: Mapping[str, str], age: float = 0.0) -> None:
        call = _call.get()
        if call is None:
            return
        telling = {
            name.lower(): value
            for name, value in headers.items()
            if any(word in name.lower() for word in _TELLING)
        }
        call.headers.append((status, telling, age, self._clock()))


def nothing_new(batch: int) -> bytes:
    """Return what a poll is answered with when there is nothing to tell since this batch."""
    return b'{"batch":%d,"ended":false,"told":[]}' % batch


def _without_keys(told: Any) -> Any:
    """What a provider quotes of a key stays here: whoever asked may not know the worker's own."""
    if isinstance(told, str):
        return redacted(told)
    if isinstance(told, dict):
        return {name: _without_keys(value) for name, value in told.items()}
    if isinstance(told, list):
        return [_without_keys(value) for value in told]
    return told
