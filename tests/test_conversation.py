"""Conversations: one turn at a time, in the order they were asked; failed turns leave no trace."""

from __future__ import annotations

import copy
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest
from datasette.app import Datasette

from datasette_llm import LLM, PromptCancelled

from .fakes import FakeModel, registered
from .hooks import hooked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from datasette_llm import WrappedConversation


class Listener(FakeModel):
    """Answers with all that was said so far; "fail" fails, "call" calls a tool, "slow" takes long."""

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
        said = [part.text for m in prompt.messages if m.role == "user" for part in m.parts]
        async for _ in super().execute(prompt, stream, response, conversation):
            pass
        if said[-1] == "slow":
            await anyio.sleep(1_000)
        if said[-1] == "fail":
            raise ZeroDivisionError("failed")
        if said[-1] == "call" and not prompt.tool_results:
            response.add_tool_call(llm.ToolCall("work", {}, "c1"))
        yield " ".join(said)


@asynccontextmanager
async def talking(fake: FakeModel | None = None, **kwargs: Any) -> AsyncIterator[WrappedConversation]:
    with registered(fake or Listener(seconds=1)):
        async with LLM(Datasette()).group("fake") as model:
            yield model.conversation(**kwargs)


async def ask(conversation: WrappedConversation, prompt: str) -> str:
    return await (await conversation.prompt(prompt)).text()


async def test_each_turn_knows_the_ones_before() -> None:
    async with talking() as conversation:
        assert [await ask(conversation, word) for word in "abc"] == ["a", "a b", "a b c"]
        assert [type(response) for response in conversation.responses] == [llm.AsyncResponse] * 3
        assert conversation.id == conversation.conversation.id
        assert conversation.name is None
        assert repr(conversation) == "<WrappedConversation fake turns=3>"
        again = copy.copy(conversation)
        assert again.id == conversation.id
        with pytest.raises(AttributeError):
            conversation.nonsense  # noqa: B018


async def test_concurrent_askers_are_answered_in_the_order_they_asked() -> None:
    fake, answers = Listener(seconds=1), []
    async with talking(fake) as conversation:

        async def asker(n: int) -> None:
            await anyio.sleep(n / 100)
            answers.append(await ask(conversation, str(n)))

        async with anyio.create_task_group() as tasks:
            for n in (3, 1, 0, 4, 2):
                tasks.start_soon(asker, n)
    assert answers == ["0", "0 1", "0 1 2", "0 1 2 3", "0 1 2 3 4"]
    assert fake.counts["peak"] == 1


async def test_prompts_and_chains_take_turns() -> None:
    answers: dict[str, str] = {}

    async def work() -> str:
        await anyio.sleep(5)
        return "worked"

    async with talking(tools=[work], chain_limit=5) as conversation:

        async def chain() -> None:
            answers["chain"] = await conversation.chain("call").text()

        async def prompt() -> None:
            await anyio.sleep(0.1)
            answers["prompt"] = await ask(conversation, "after")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(chain)
            tasks.start_soon(prompt)
    assert answers == {"chain": "call call", "prompt": "call after"}


async def test_a_failed_turn_is_not_part_of_the_history() -> None:
    async with talking() as conversation:
        await ask(conversation, "a")
        failed = await conversation.prompt("fail")
        assert await ask(conversation, "b") == "a b"
        with pytest.raises(ZeroDivisionError):
            await failed.text()
        assert len(conversation.responses) == 2


async def test_what_a_conversation_was_loaded_with_outlives_a_failed_turn() -> None:
    async with talking() as conversation:
        conversation.conversation.loaded_messages = [llm.user("before")]
        with pytest.raises(ZeroDivisionError):
            await ask(conversation, "fail")
        assert await ask(conversation, "after") == "before after"


async def test_a_turn_refused_by_a_wrapper_is_not_part_of_the_history() -> None:
    def llm_prompt_context(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            if prompt == "refused":
                raise PermissionError("no")
            yield
            if prompt == "regretted":
                raise PermissionError("no")

        return wrapper

    with hooked(llm_prompt_context=llm_prompt_context):
        async with talking() as conversation:
            await ask(conversation, "a")
            for word in ("refused", "regretted"):
                with pytest.raises(PermissionError):
                    await ask(conversation, word)
            assert await ask(conversation, "b") == "a b"


async def test_a_cancelled_turn_lets_the_next_one_go_on() -> None:
    async with talking() as conversation:
        await ask(conversation, "a")
        slow = await conversation.prompt("slow")
        answers = []

        async def asker() -> None:
            answers.append(await ask(conversation, "b"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(asker)
            await anyio.sleep(3)
            slow.cancel()
        assert answers == ["a b"]
        with pytest.raises(PromptCancelled):
            await slow.text()


async def test_who_is_cancelled_while_waiting_stands_back() -> None:
    fake = Listener(seconds=1)
    async with talking(fake) as conversation:
        first = await conversation.prompt("first")
        with anyio.move_on_after(0.5) as scope:
            await conversation.prompt("impatient")
        assert scope.cancelled_caught
        assert await ask(conversation, "patient") == "first patient"
        assert await first.text() == "first"
    assert fake.counts["opened"] == 2


@pytest.mark.parametrize("how", ["fails", "cancelled", "left"])
async def test_a_chain_that_does_not_end_well_leaves_no_open_tool_calls(how: str) -> None:
    async def work() -> str:
        await anyio.sleep(1)
        return "worked"

    def failing_after(*args: Any) -> None:
        raise ArithmeticError("after")

    async with talking(tools=[work], after_call=failing_after if how == "fails" else None) as conversation:
        await ask(conversation, "a")
        chain = conversation.chain("call")
        if how == "fails":
            with pytest.raises(ArithmeticError):
                await chain.text()
        elif how == "cancelled":
            with anyio.move_on_after(1.5):
                await chain.text()
        else:
            async for response in chain.responses():
                await response.text()
                break
        assert await ask(conversation, "b") == "a b"


async def test_a_chain_that_paused_or_reached_its_limit_can_be_resumed() -> None:
    paused: list[bool] = []

    async def work() -> str:
        if not paused:
            paused.append(True)
            raise llm.PauseChain("ask")
        return "worked"

    async with talking(tools=[work]) as conversation:
        with pytest.raises(llm.PauseChain):
            await conversation.chain("call").text()
        assert await conversation.chain(None).text() == "call"
        assert await ask(conversation, "b") == "call b"

    async with talking(tools=[work], chain_limit=1) as conversation:
        with pytest.raises(ValueError, match="Chain limit of 1 exceeded"):
            await conversation.chain("call").text()
        assert await conversation.chain(None, chain_limit=2).text() == "call"


async def test_what_is_part_of_a_turn_cannot_wait_for_the_next_one() -> None:
    async def work() -> str:
        return await ask(conversation, "inner")

    async with talking(tools=[work]) as conversation:
        responses = [response async for response in conversation.chain("call").responses()]
        [result] = responses[1].prompt.tool_results
        assert isinstance(result.exception, RuntimeError)
        assert "part of a turn" in result.output
        response = await conversation.prompt("b")

        async def callback(response: Any) -> None:
            await conversation.prompt("inner")

        await response.on_done(callback)
        with pytest.raises(RuntimeError, match="part of a turn"):
            await response.text()
        # Another conversation is no problem, nor is the same one afterwards.
        assert await ask(conversation, "c") == "call c"


async def test_an_argument_that_llm_refuses_takes_no_turn() -> None:
    async with talking() as conversation:
        with pytest.raises(ValueError, match="temperature"):
            await conversation.prompt("a", temperature="hot")
        with pytest.raises(TypeError, match="heat"):
            conversation.chain("a", heat=1)
        assert await ask(conversation, "b") == "b"


async def test_two_conversations_do_not_wait_for_each_other() -> None:
    fake = Listener(seconds=1)
    with registered(fake):
        model = await LLM(Datasette()).model("fake")
        left, right = model.conversation(), model.conversation()
        began = anyio.current_time()
        responses = [await left.prompt("a"), await right.prompt("b")]
        assert [await response.text() for response in responses] == ["a", "b"]
        assert anyio.current_time() - began == pytest.approx(1)


async def test_a_turn_tried_again_has_the_history_of_its_conversation_once() -> None:
    failures: list[Exception] = []

    class Shaky(Listener):
        async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
            if len(conversation.responses) == 1 and not failures:
                failures.append(ConnectionError("lost"))
                raise failures[0]
            async for chunk in super().execute(prompt, stream, response, conversation):
                yield chunk

    async with talking(Shaky(seconds=1)) as conversation:
        assert [await ask(conversation, word) for word in "abc"] == ["a", "a b", "a b c"]
        assert len(conversation.responses) == 3
    assert failures
