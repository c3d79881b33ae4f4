"""Chains as supervised tasks: wrappers, readers that share, leave or are cancelled, owners that end."""

from __future__ import annotations

import copy
import gc
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest
from datasette.app import Datasette

from datasette_llm import LLM, GroupClosed, PromptCancelled

from .fakes import FakeModel, registered
from .hooks import hooked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from datasette_llm import PromptResult

LAST_TURN = 3


class ToolModel(FakeModel):
    """Calls the tool ``work`` in each turn but the last one; a turn takes a second."""

    def __init__(self, *, fails_in: int | None = None, seconds: float = 1) -> None:
        super().__init__(seconds=seconds)
        self.fails_in = fails_in

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
        turn = sum(message.role == "tool" for message in prompt.messages) + 1
        async for _ in super().execute(prompt, stream, response, conversation):
            yield f"turn {turn}"
        if turn == self.fails_in:
            raise ZeroDivisionError(f"turn {turn}")
        if turn < LAST_TURN:
            response.add_tool_call(llm.ToolCall("work", {}, f"c{turn}"))


class Recorder:
    """A plugin's wrapper that notes everything it sees."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.result: PromptResult | None = None
        self.refuse: Exception | None = None

    @asynccontextmanager
    async def wrapper(self, result: PromptResult) -> AsyncIterator[None]:
        self.notes.append("entered")
        if self.refuse:
            raise self.refuse
        self.result = result
        assert result.is_chain
        assert not result.chain_complete

        async def done(response: llm.AsyncResponse) -> None:
            self.notes.append("answer " + await response.text())

        await result.on_response_done(done)
        try:
            yield
        except Exception as error:
            self.notes.append(f"left with {type(error).__name__}")
            raise
        self.notes.append("left")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    with hooked(llm_prompt_context=lambda: recorder.wrapper):
        yield recorder


@asynccontextmanager
async def chain_model(fake: FakeModel | None = None, *, grouped: bool = False, **kwargs: Any) -> Any:
    with registered(fake or ToolModel()):
        if grouped:
            async with LLM(Datasette()).group("fake", **kwargs) as model:
                yield model
        else:
            yield await LLM(Datasette()).model("fake")


class Work:
    """The tool: takes a second, and counts."""

    def __init__(self) -> None:
        self.began = 0
        self.ended = 0

    async def work(self) -> str:
        self.began += 1
        await anyio.sleep(1)
        self.ended += 1
        return "worked"


async def read_responses(chain: Any) -> str:
    return " ".join([await response.text() async for response in chain.responses()])


async def read_text(chain: Any) -> str:
    return "".join([text async for text in chain])


async def read_events(chain: Any) -> str:
    return "".join([event.chunk async for event in chain.astream_events()])


async def read_all(chain: Any) -> str:
    return str(await chain.text())


READS = [read_responses, read_text, read_events, read_all]
WHOLE = "turn 1 turn 2 turn 3"


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize("read", READS)
async def test_every_way_to_read_runs_the_wrappers_once(
    read: Callable[[Any], Any], grouped: bool, recorder: Recorder
) -> None:
    async with chain_model(grouped=grouped) as model:
        chain = model.chain("go", tools=[Work().work])
        assert recorder.notes == []
        assert await read(chain) == WHOLE
    assert recorder.notes == ["entered", "answer turn 1", "answer turn 2", "answer turn 3", "left"]
    result = recorder.result
    assert result is not None
    assert result.chain_complete
    assert [await r.text() for r in result.responses] == ["turn 1", "turn 2", "turn 3"]
    assert result.response is result.responses[-1]
    assert [r.id for r in result.responses] == [r.id for r in chain._responses]


async def test_the_wrappers_are_entered_before_the_first_model_call(recorder: Recorder) -> None:
    recorder.refuse = PermissionError("no")
    fake, work = ToolModel(), Work()
    async with chain_model(fake) as model:
        for read in READS:
            with pytest.raises(PermissionError, match="no"):
                await read(model.chain("go", tools=[work.work]))
    assert recorder.notes == ["entered"] * 4
    assert fake.counts["opened"] == 0


async def test_the_tools_of_a_turn_run_when_the_next_response_is_asked_for() -> None:
    work = Work()
    async with chain_model() as model:
        responses = model.chain("go", tools=[work.work]).responses()
        first = await anext(responses)
        assert await first.text() == "turn 1"
        await anyio.sleep(100)
        assert work.began == 0
        await anext(responses)
        assert work.ended == 1


async def test_the_last_turn_ends_the_chain_unasked(recorder: Recorder) -> None:
    async with chain_model() as model:
        responses = model.chain("go", tools=[Work().work]).responses()
        for _ in range(LAST_TURN):
            response = await anext(responses)
        await response.text()
        await anyio.sleep(0.1)
        assert recorder.notes[-1] == "left"
        with pytest.raises(StopAsyncIteration):
            await anext(responses)


async def test_chunks_of_a_turn_arrive_live() -> None:
    async def script(prompt: str) -> Any:
        for word in ("one ", "two"):
            await anyio.sleep(1)
            yield word

    async with chain_model(FakeModel(script)) as model:
        began = anyio.current_time()
        arrived = [(round(anyio.current_time() - began), text) async for text in model.chain("go")]
    assert arrived == [(1, "one "), (2, "two")]


async def test_many_readers_see_the_same_and_tools_run_once() -> None:
    work, fake = Work(), ToolModel()
    texts: list[str] = []
    async with chain_model(fake) as model:
        chain = model.chain("go", tools=[work.work])

        async def reader(read: Any, seconds: float) -> None:
            await anyio.sleep(seconds)
            texts.append(await read(chain))

        async with anyio.create_task_group() as tasks:
            for n, read in enumerate(READS * 2):
                tasks.start_soon(reader, read, n * 0.7)
        # Afterwards too.
        assert await read_text(chain) == WHOLE
    assert texts == [WHOLE] * 8
    assert work.began == LAST_TURN - 1
    assert fake.counts["opened"] == LAST_TURN


# A failure


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("turn", [1, 2, 3])
async def test_a_failure_of_the_model_reaches_wrappers_and_readers(
    turn: int, read: Callable[[Any], Any], recorder: Recorder
) -> None:
    async with chain_model(ToolModel(fails_in=turn), grouped=True) as model:
        chain = model.chain("go", tools=[Work().work])
        for _ in range(3):
            with pytest.raises(ZeroDivisionError, match=f"turn {turn}"):
                await read(chain)
        assert model.stats.failed == 1
    assert recorder.notes[-1] == "left with ZeroDivisionError"
    assert recorder.result is not None
    assert not recorder.result.chain_complete


async def test_a_wrapper_that_fails_at_its_end_is_the_chains_error() -> None:
    @asynccontextmanager
    async def wrapper(result: Any) -> AsyncIterator[None]:
        yield
        raise PermissionError("over budget")

    with hooked(llm_prompt_context=lambda: wrapper):
        async with chain_model() as model:
            with pytest.raises(PermissionError, match="over budget"):
                await model.chain("go", tools=[Work().work]).text()


async def test_a_callback_that_fails_ends_the_chain(recorder: Recorder) -> None:
    work = Work()
    async with chain_model() as model:
        chain = model.chain("go", tools=[work.work])
        responses = chain.responses()
        first = await anext(responses)

        def callback(response: Any) -> None:
            raise ArithmeticError("callback")

        await first.on_done(callback)
        with pytest.raises(ArithmeticError, match="callback"):
            await first.text()
        with pytest.raises(ArithmeticError, match="callback"):
            await anext(responses)
    assert work.began == 0
    assert recorder.notes[-1] == "left with ArithmeticError"


async def test_a_pause_leaves_the_wrappers_normally(recorder: Recorder) -> None:
    def work() -> str:
        raise llm.PauseChain("ask somebody")

    async with chain_model(grouped=True) as model:
        chain = model.chain("go", tools=[work])
        for read in READS:
            with pytest.raises(llm.PauseChain, match="ask somebody") as caught:
                await read(chain)
            assert caught.value.tool_call is not None
            assert caught.value.tool_call.tool_call_id == "c1"
        assert model.stats.failed == model.stats.cancelled == 0
    assert recorder.notes == ["entered", "answer turn 1", "left"]
    assert recorder.result is not None
    assert not recorder.result.chain_complete


# Readers that leave


async def leave_by_break(chain: Any) -> None:
    async for _ in chain.responses():
        break


async def leave_text(chain: Any) -> None:
    async for _ in chain:
        break


async def leave_in_the_tool(chain: Any) -> None:
    with anyio.move_on_after(1.5):
        await chain.text()


async def leave_in_the_second_call(chain: Any) -> None:
    with anyio.move_on_after(2.5):
        await read_responses(chain)


async def leave_by_cancel(chain: Any) -> None:
    async with anyio.create_task_group() as tasks:

        async def reader() -> None:
            with pytest.raises(PromptCancelled):
                await read_events(chain)

        tasks.start_soon(reader)
        await anyio.sleep(1.5)
        chain.cancel()


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_text, leave_in_the_tool, leave_in_the_second_call, leave_by_cancel]
)
async def test_a_chain_that_nobody_reads_ends(leave: Any, grouped: bool, recorder: Recorder) -> None:
    fake, work = ToolModel(), Work()
    async with chain_model(fake, grouped=grouped) as model:
        chain = model.chain("go", tools=[work.work])
        await leave(chain)
        gc.collect()
        await anyio.sleep(0.1)
        calls = fake.counts["opened"]
        assert fake.counts["closed"] == calls
        # The first turn's only chunk is also its end, so nothing was under way any more.
        assert recorder.notes[-1] == ("left" if leave is leave_text else "left with PromptCancelled")
        assert recorder.notes.count("entered") == 1
        await anyio.sleep(10)
        assert (fake.counts["opened"], work.ended) == (calls, min(work.began, work.ended))
        with pytest.raises(PromptCancelled):
            await chain.text()


async def test_a_reader_that_leaves_between_turns_lets_the_wrappers_end_normally(recorder: Recorder) -> None:
    async with chain_model() as model:
        chain = model.chain("go", tools=[Work().work])
        async with aclosing(chain.responses()) as responses:
            await (await anext(responses)).text()
            await anyio.sleep(1)
        await anyio.sleep(1)
        with pytest.raises(PromptCancelled, match="left by its readers"):
            await chain.text()
    assert recorder.notes == ["entered", "answer turn 1", "left"]


async def test_a_reader_that_leaves_while_callbacks_run_lets_them_finish(recorder: Recorder) -> None:
    finished = []
    async with chain_model() as model:
        responses = model.chain("go", tools=[Work().work]).responses()

        async def callback(response: Any) -> None:
            await anyio.sleep(1)
            finished.append(response)

        await (await anext(responses)).on_done(callback)
        await anyio.sleep(1.5)
        await responses.aclose()
        await anyio.sleep(1)
    assert len(finished) == 1
    assert recorder.notes == ["entered", "answer turn 1", "left"]


async def test_one_reader_of_two_that_leaves_changes_nothing() -> None:
    async with chain_model() as model:
        chain = model.chain("go", tools=[Work().work])
        staying = chain.responses()
        await leave_by_break(chain)
        gc.collect()
        await anyio.sleep(1)
        assert len([response async for response in staying]) == LAST_TURN


async def test_a_chain_that_is_never_read_never_starts(recorder: Recorder) -> None:
    fake = ToolModel()
    async with chain_model(fake, grouped=True) as model:
        chain = model.chain("go", tools=[Work().work])
        chain.cancel()
        chain.responses()
    assert recorder.notes == []
    assert fake.counts["opened"] == 0
    with pytest.raises(GroupClosed):
        await chain.text()


# Owners that end


async def test_a_block_does_not_wait_for_a_reader_that_asks_no_more(recorder: Recorder) -> None:
    work = Work()
    async with chain_model(grouped=True) as model:
        responses = model.chain("go", tools=[work.work]).responses()
        response = await anext(responses)
    assert await response.text() == "turn 1"
    assert work.began == 0
    assert recorder.notes == ["entered", "answer turn 1", "left"]
    with pytest.raises(PromptCancelled):
        await anext(responses)


async def test_a_block_waits_for_a_chain_that_is_read_to_its_end() -> None:
    texts = []
    async with anyio.create_task_group() as tasks:
        async with chain_model(grouped=True) as model:

            async def reader() -> None:
                texts.append(await model.chain("go", tools=[Work().work]).text())

            tasks.start_soon(reader)
            await anyio.sleep(0.5)
        assert texts == [WHOLE]


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5, 3.5])
async def test_a_block_that_is_cancelled_cancels_its_chains(seconds: float, recorder: Recorder) -> None:
    fake = ToolModel()
    with anyio.move_on_after(seconds) as scope:
        async with chain_model(fake, grouped=True) as model:
            await model.chain("go", tools=[Work().work]).text()
    assert scope.cancelled_caught
    assert recorder.notes[-1] == "left with PromptCancelled"
    assert fake.counts["opened"] == fake.counts["closed"]


async def test_tools_hold_no_slot_and_may_prompt_the_same_group() -> None:
    async with chain_model(grouped=True, concurrency=1) as model:

        async def work() -> str:
            response = await model.prompt("inner")
            return str(await response.text())

        chains = [model.chain("go", tools=[work]) for _ in range(3)]
        texts: list[str] = []

        async def reader(chain: Any) -> None:
            texts.append(await chain.text())

        async with anyio.create_task_group() as tasks:
            for chain in chains:
                tasks.start_soon(reader, chain)
    assert texts == [WHOLE] * 3


async def test_a_tool_may_run_a_chain_of_the_same_group() -> None:
    async with chain_model(grouped=True, concurrency=1) as model:

        async def work() -> str:
            return str(await model.chain("inner", tools=[Work().work]).text())

        assert await model.chain("go", tools=[work]).text() == WHOLE


# What it is asked with


async def test_configured_options_are_defaults() -> None:
    seen = []

    class Spy(FakeModel):
        async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
            seen.append(prompt.options.temperature)
            yield "fine"

    settings = {"default_model": {"model": "fake", "options": {"temperature": 0.3}}}
    with registered(Spy()):
        model = await LLM(Datasette(config={"plugins": {"datasette-llm": settings}})).model("fake")
        await model.chain("go").text()
        await model.chain("go", options={"temperature": 0.9}).text()
        await model.conversation().chain("go").text()
    assert seen == [0.3, 0.9, 0.3]


async def test_says_what_llms_chain_says() -> None:
    async with chain_model() as model:
        chain = model.chain("go", chain_limit=7)
        assert chain.chain_limit == 7
        assert chain.prompt.prompt == "go"
        assert chain.conversation.id
        with pytest.raises(AttributeError):
            chain.nonsense  # noqa: B018


async def test_is_written_to_llms_log() -> None:
    import sqlite_utils
    from llm.migrations import migrate

    db = sqlite_utils.Database(memory=True)
    migrate(db)
    async with chain_model() as model:
        chain = model.chain("go", tools=[Work().work])
        await chain.text()
        chain.log_to_db(db)
    assert sum(table.count for table in db.tables if table.name in ("responses", "turns")) == LAST_TURN


async def test_a_retry_is_no_turn() -> None:
    class Shaky(ToolModel):
        async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
            if self.counts["opened"] == 1:
                self.counts["opened"] += 1
                raise ConnectionError("lost")
            async for chunk in super().execute(prompt, stream, response, conversation):
                yield chunk

    async with chain_model(Shaky()) as model:
        chain = model.chain("go", tools=[Work().work])
        assert await chain.text() == WHOLE
        assert [response.attempts for response in chain._responses] == [1, 2, 1]


async def test_a_chain_can_be_copied_and_a_reader_that_was_closed_has_ended() -> None:
    with registered(ToolModel(seconds=0)):
        asked = (await LLM(Datasette()).model("fake")).chain("x", tools=[Work().work])
        assert copy.copy(asked).chain_limit == asked.chain_limit
        responses = asked.responses()
        async with aclosing(asked.astream_events()) as events:
            assert (await anext(responses)).prompt.prompt == "x"
            assert (await anext(events)).type == "text"
        responses.close()
        for reader in (responses, events):
            with pytest.raises(StopAsyncIteration):
                await anext(reader)
