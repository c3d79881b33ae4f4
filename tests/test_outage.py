"""A provider that is away: one call at a time tries, others wait, and nothing is lost; on virtual time."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import LLM
from datasette_llm.errors import ProviderUnreachable
from datasette_llm.pace.outage import Outage
from datasette_llm.pace.outcome import Outcome, Trouble
from datasette_llm.pace.policy import ConcurrencyBounds, Patience, PromptSettings
from datasette_llm.pace.throttle import Throttle
from tests.fakes import FakeModel, registered
from tests.hooks import datasette_with

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from datasette_llm.pace.slots import Slots

REFUSED = ConnectionRefusedError(111, "Connection refused")
ALWAYS = Patience(1800, together=True)


class Gateway(Exception):
    """What an SDK raises for an HTTP answer."""

    def __init__(self, status_code: int, retry_after: float | None = None) -> None:
        super().__init__(f"status {status_code}")
        self.status_code = status_code
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}


ERRORS: dict[str, Callable[[], Exception]] = {
    "refused": lambda: REFUSED,
    "name": lambda: socket.gaierror(-2, "Name or service not known"),
    "503": lambda: Gateway(503),
    "502": lambda: Gateway(502),
}


class Provider:
    """A model that cannot be reached for a while.

    Args:
        away: from when to when.
        error: what makes the error of a call in that time.
        seconds: how long an answer takes.
    """

    def __init__(
        self, away: tuple[float, float], error: Callable[[], Exception], seconds: float = 0.5
    ) -> None:
        self.away = away
        self.error = error
        self.seconds = seconds
        self.began = anyio.current_time()
        self.tried_at: list[float] = []
        self.answered_at: list[float] = []

    async def answer(self, prompt: str) -> AsyncGenerator[Any, None]:
        self.tried_at.append(self.now)
        if self.is_away:
            await anyio.sleep(0.001)
            raise self.error()
        await anyio.sleep(self.seconds)
        if self.is_away:
            raise ConnectionResetError(104, "Connection reset by peer")
        self.answered_at.append(self.now)
        yield prompt.upper()

    @property
    def now(self) -> float:
        return anyio.current_time() - self.began

    @property
    def is_away(self) -> bool:
        return self.away[0] <= self.now < self.away[1]


async def run_job(
    provider: Provider, prompts: Iterable[Any], *, patience: float | Patience | None = 1800.0, **options: Any
) -> tuple[list[Any], Any]:
    """Run a job; return its answers or errors in the order of the prompts, and the group's last stats."""
    answers: dict[Any, Any] = {}
    with registered(FakeModel(provider.answer)):
        async with LLM(datasette_with(options.pop("config", {}))).group(
            "fake", outage_timeout=patience, **options
        ) as model:
            async for item, response in model.map(prompts, str):
                answers[item] = response.error or await response.text()
        return [answers[item] for item in prompts], model.stats


@pytest.mark.parametrize("seconds", [20, 1200])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
async def test_an_outage_is_waited_out_and_nobody_fails(
    seconds: float, error: Callable[[], Exception]
) -> None:
    provider = Provider((2.0, 2.0 + seconds), error)
    prompts = range(400)
    answers, stats = await run_job(provider, prompts, concurrency=40)
    assert answers == [str(number) for number in prompts]
    assert stats.failed == 0
    during = [at for at in provider.tried_at if provider.away[0] + 1 <= at < provider.away[1]]
    # One at a time, 1 to 30 seconds apart.
    assert len(during) <= 20 + seconds / 25
    back_at = min(at for at in provider.answered_at if at >= provider.away[1])
    assert back_at - provider.away[1] <= min(30, 0.25 * seconds) + 2
    # All of them are let in again soon.
    busy = [at for at in provider.answered_at if back_at <= at <= back_at + 4]
    assert len(busy) >= 100


async def test_what_is_refused_as_an_outage_begins_tells_of_no_rate() -> None:
    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        if 10 <= anyio.current_time() - began < 15:
            # Some are still answered meanwhile, so it is taken for a rate limit first.
            await anyio.sleep(0.01)
            raise Gateway(503, retry_after=1.0)
        await anyio.sleep(1 + (int(prompt) / 10 if int(prompt) < 10 else 0))
        answered_at.append(anyio.current_time() - began)
        yield prompt

    answered_at: list[float] = []
    began = anyio.current_time()
    with registered(FakeModel(answer)):
        async with LLM(datasette_with()).group("fake", outage_timeout=1800, concurrency=10) as model:
            errors = [response.error async for _, response in model.map(range(400), str)]
    assert errors == [None] * 400
    # Ten a second before it, and soon again.
    assert sum(25 <= at < 30 for at in answered_at) >= 45


async def test_away_is_told_while_it_lasts() -> None:
    provider = Provider((2.0, 60.0), lambda: REFUSED)
    with registered(FakeModel(provider.answer)):
        async with (
            LLM(datasette_with()).group("fake", outage_timeout=1800, concurrency=20) as model,
            anyio.create_task_group() as tasks,
        ):

            async def read() -> None:
                async for _, response in model.map(range(200), str):
                    assert response.error is None

            tasks.start_soon(read)
            await anyio.sleep(1)
            assert model.stats.away is None
            await anyio.sleep(19)
            away = model.stats.away
            assert away is not None
            assert away.what == "the connection is refused"
            assert 17 < away.seconds < 19
            assert 0 <= away.next_try <= 5
            assert away.reached
            await anyio.sleep(100)
            assert model.stats.away is None


async def test_a_job_gives_up_when_its_patience_ends() -> None:
    provider = Provider((2.0, 1e9), lambda: REFUSED)
    answers, _ = await run_job(provider, range(200), patience=300.0, concurrency=20)
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert failed
    assert all(isinstance(error, ProviderUnreachable) for error in failed)
    assert isinstance(failed[0].__cause__, ConnectionRefusedError)
    assert 295 <= provider.now <= 310


async def test_a_first_contact_that_fails_ends_a_job_soon() -> None:
    provider = Provider((0.0, 1e9), lambda: REFUSED)
    answers, _ = await run_job(provider, range(200), patience=Patience(1800, together=True, first_contact=10))
    assert all(isinstance(error, ProviderUnreachable) and not error.reached for error in answers)
    assert provider.now == pytest.approx(10, abs=0.5)
    assert len(provider.tried_at) < 60


async def test_whoever_waits_for_an_answer_is_told_within_the_bounds_of_its_retries() -> None:
    provider = Provider((0.0, 1e9), lambda: REFUSED)
    answers, _ = await run_job(
        provider, range(30), patience=None, config={"retries": {"timeout": 20}}, concurrency=10
    )
    assert all(isinstance(error, (ConnectionRefusedError, ProviderUnreachable)) for error in answers)
    assert provider.now <= 3 * 20 + 10


async def test_a_prompt_that_breaks_the_connection_fails_alone() -> None:
    calls = 0

    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        nonlocal calls
        await anyio.sleep(0.2)
        if prompt == "7":
            calls += 1
            raise ConnectionResetError(104, "Connection reset by peer")
        yield prompt

    with registered(FakeModel(answer)):
        async with LLM(datasette_with()).group("fake", outage_timeout=1800, concurrency=2) as model:
            began = anyio.current_time()
            failed = [item async for item, response in model.map(range(100), str) if response.error]
    assert failed == [7]
    assert calls == 6
    assert anyio.current_time() - began <= 25


async def test_the_last_prompt_that_breaks_the_connection_is_no_outage() -> None:
    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    with registered(FakeModel(answer)):
        async with LLM(datasette_with()).group("fake", outage_timeout=1800) as model:
            response = await model.prompt("x", stream=False)
            with pytest.raises(ConnectionResetError):
                await response.text()
            assert response.attempts == 6


@pytest.mark.parametrize("error", [ERRORS["refused"], ERRORS["503"]], ids=["refused", "503"])
async def test_the_last_prompt_waits_out_an_outage_too(error: Callable[[], Exception]) -> None:
    provider = Provider((0.0, 300.0), error)
    answers, _ = await run_job(provider, ["x"])
    assert answers == ["X"]


@pytest.mark.parametrize("concurrency", [1, 2, 10])
async def test_few_at_a_time_a_provider_that_is_silent_for_long_is_waited_out_too(concurrency: int) -> None:
    silent, began = range(31, 1212), anyio.current_time()

    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        now = anyio.current_time() - began
        await anyio.sleep(1)
        if now + 1 > silent.start:
            await anyio.sleep(max(0.0, silent.stop - now))
        yield prompt

    with registered(FakeModel(answer)):
        group = LLM(datasette_with()).group("fake", concurrency=concurrency, outage_timeout=1800)
        async with group as model:
            errors = [response.error async for _, response in model.map(range(150), str)]
    assert errors == [None] * 150


@pytest.mark.parametrize("concurrency", [1, 10, None])
async def test_a_partial_outage_slows_down_and_never_stops(concurrency: int | None) -> None:
    count = 0

    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        nonlocal count
        count += 1
        if count % 2:
            raise REFUSED
        await anyio.sleep(0.2)
        yield prompt

    with registered(FakeModel(answer)):
        datasette = datasette_with({"retries": {"attempts": 20}})
        async with LLM(datasette).group("fake", outage_timeout=60, concurrency=concurrency) as model:
            began = anyio.current_time()
            errors = [response.error async for _, response in model.map(range(300), str)]
    assert errors == [None] * 300
    assert anyio.current_time() - began <= (240 if concurrency == 1 else 90)


def trouble(*, alone: bool = False) -> Trouble:
    return Trouble("the connection is refused", REFUSED, "127.0.0.1:1", alone=alone)


def test_the_states_of_an_outage() -> None:
    outage = Outage("m")
    # Open: a failure or two are chance.
    assert not outage.failed(0.0, 0.0, trouble(), 5, None, "a")
    assert not outage.active
    outage.answered(0.1, 0.05)
    assert outage.forgotten
    # Open -> away: so many in a row are none.
    began = [outage.failed(1.0, 0.9, trouble(), 2, None, number) for number in range(10)]
    assert began == [False] * 9 + [True]
    assert outage.opening(1.0, 0) == 2.0
    # One probe, and the next one later.
    outage.sent(2.0)
    assert outage.opening(2.0, 1) > 3.0
    outage.failed(2.1, 2.0, trouble(), 0, None, "a")
    assert outage.opening(2.1, 0) == pytest.approx(3.1)
    # An answer to what was sent before says nothing.
    assert not outage.answered(2.5, 0.8)
    assert outage.active
    # Away -> returning: few at a time.
    assert outage.answered(4.0, 3.5)
    assert (outage.active, outage.room) == (False, 2)
    assert outage.opening(4.0, 2) == float("inf")
    # Returning -> away: two in a row.
    assert not outage.failed(4.1, 4.0, trouble(), 1, None, "a")
    assert outage.failed(4.2, 4.0, trouble(), 0, None, "b")
    # Returning -> open: each answer lets two more in.
    assert outage.answered(8.0, 7.0)
    outage.answered(8.1, 8.0)
    assert outage.room == 4
    outage.widened(4)
    assert not outage.waiting


def test_an_outage_begins_when_the_last_answer_came() -> None:
    outage = Outage("m")
    outage.answered(50.0, 10.0)
    # They had waited in line for a long time, while others were answered.
    assert any(outage.failed(60.0, 5.0, trouble(), 0, None, number) for number in range(8))
    assert outage.began == 50.0
    assert outage.seconds(70.0) == 20.0
    # All the same it is the outage that they failed for.
    assert outage.covers(5.0, alone=False)
    assert not outage.covers(4.0, alone=False)


def test_what_one_prompt_can_do_alone_takes_several_prompts_to_be_an_outage() -> None:
    outage = Outage("m")
    assert not any(outage.failed(float(at), at - 0.1, trouble(alone=True), 0, None, "a") for at in range(20))
    assert not outage.failed(21.0, 20.9, trouble(alone=True), 0, None, "b")
    assert outage.failed(22.0, 21.9, trouble(alone=True), 0, None, "c")


async def test_a_probe_that_is_cancelled_leaves_room_for_the_next() -> None:
    throttle = Throttle("m", PromptSettings())
    slots: Slots = throttle.slots(ConcurrencyBounds(), patience=ALWAYS)
    for _ in range(20):
        await slots.acquire()
    for _ in range(20):
        slots.release(Outcome("transient", trouble=trouble()))
    assert throttle.away
    await slots.acquire()
    slots.release(Outcome("cancelled"))
    with anyio.fail_after(2):
        await slots.acquire()
    assert slots.in_use == 1
