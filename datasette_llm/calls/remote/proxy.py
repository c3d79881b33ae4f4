"""The `execute()` of a model whose calls workers make, and the pool that gives it to a group's copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llm
from opentelemetry import propagate

from .. import attempt_time, http_answers
from ..clients.pool import ClientPool
from ..tracing import describe_worker, is_traced
from . import answers, identity
from .flown_errors import arrived
from .key_offers import KeyOffer
from .questions import question_of
from .seat import Seat

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ..clients.transport import Observe
    from ..workers import Workers
    from .engine import Engine
    from .fleet import Figures, Fleet


class RemoteExecute:
    """A model's ``execute()``: asks a worker, and yields and keeps what the worker's model did.

    Attributes:
        seat: where it asks; there is one from when the group is entered.
    """

    def __init__(self, model: Any, observe: Observe | None) -> None:
        self.seat: Seat | None = None
        self._model_id: str = model.model_id
        self._own_key = getattr(model, "key", None)
        self._names = [getattr(model, "needs_key", None), getattr(model, "key_env_var", None)]
        self._observe = observe
        self._keys: dict[str, KeyOffer] = {}

    def offer(self, key: str | None) -> KeyOffer | None:
        """Return a key as workers are told of it."""
        key = self._own_key if key is None else key
        if not key:
            return None
        known = self._keys.get(key)
        if known is None:
            known = self._keys[key] = KeyOffer([name for name in self._names if name], key)
        return known

    async def __call__(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None, key: str | None = None
    ) -> AsyncGenerator[Any, None]:
        question = question_of(prompt, stream, conversation)
        question["model"] = self._model_id
        offer = self.offer(key)
        if offer is not None:
            question["key"] = offer.reference
        traced = is_traced()
        if traced:
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            question["trace"] = carrier
        if self.seat is None:
            raise RuntimeError("the group's block has not been entered")
        call = self.seat.ask(self._model_id, question, offer)
        try:
            while True:
                kind, value = await call.receive()
                if kind == "events":
                    for chunk in answers.chunks_from(value):
                        yield chunk
                    continue
                if kind == "waits":
                    attempt_time.stand_still()
                    continue
                if kind == "goes":
                    attempt_time.go_on()
                    continue
                if kind == "lost":
                    raise value
                self._tell(value.get("headers", ()))
                if kind == "failed":
                    raise arrived(value["error"])
                for chunk in answers.chunks_from(value["events"]):
                    yield chunk
                answers.keep(response, value)
                return
        finally:
            call.withdraw()
            if traced:
                describe_worker(call.worker, call.deaths)

    def _tell(self, headers: Any) -> None:
        for status, told, age, since in headers:
            http_answers.tell(status, told)
            if self._observe is not None:
                self._observe(status, told, age + since)


class RemotePool(ClientPool):
    """Stands where a group's HTTP clients are: its model's calls go to workers.

    Args:
        workers: which ones.
    """

    def __init__(self, workers: Workers) -> None:
        super().__init__()
        self._workers = workers
        self._fleet: Fleet | None = workers.fleet
        self._engine: Engine | None = None

    @property
    def figures(self) -> Figures | None:
        """What the workers did so far, of all that ask them."""
        return None if self._fleet is None else self._fleet.figures

    def adopt(self, model: Any, observe: Observe | None = None) -> bool:
        """Have a model's calls be made by workers."""
        model.execute = RemoteExecute(model, observe)
        return True

    async def prepare(self, model: Any, key: str | None) -> None:
        """Wait for a worker, and see that it has the same model and can use the key.

        Raises:
            WorkersError: no worker can be used, for the reason it tells.
            NoWorkers: none came in time.
        """
        from .engine import hold

        execute = model.execute
        if self._fleet is None:
            self._engine = await hold(self._workers)
            self._fleet = self._engine.fleet
        try:
            execute.seat = Seat(self._fleet)
            offer = execute.offer(key if isinstance(model, llm.AsyncKeyModel) else None)
            await execute.seat.prepare(identity.of_model(model), offer)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Let go of the workers, and close what else the group shares."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.release()
        await super().aclose()
