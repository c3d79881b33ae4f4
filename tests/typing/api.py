"""The public signatures as a plugin uses them. Only type checkers read this; it is never run."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import llm
from pydantic import BaseModel
from typing_extensions import assert_type

from datasette_llm import (
    LLM,
    Group,
    GroupClosed,
    GroupModel,
    ModelNotFoundError,
    PromptCancelled,
    PromptResponse,
    PromptResult,
    Purpose,
    WrappedAsyncModel,
    WrappedConversation,
    enrich,
    get_purposes,
)
from datasette_llm.enrich import EnrichProgress, EnrichReport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from datasette.app import Datasette


class Dog(BaseModel):
    name: str


async def one_prompt(datasette: Datasette) -> str:
    models = LLM(datasette)
    model = await models.model("echo", purpose="extract", actor={"id": "ana"})
    assert_type(model, WrappedAsyncModel)
    assert_type(model.model_id, str)
    response = await model.prompt("hello", system="be brief", schema=Dog, stream=False)
    assert_type(response, PromptResponse)
    assert_type(response.done, bool)
    assert_type(response.error, Exception | None)
    assert_type(response.attempts, int)
    response.cancel()
    async for chunk in response:
        assert_type(chunk, str)
    async for event in response.astream_events():
        assert_type(event, llm.parts.StreamEvent)
    a_response_of_llm: llm.AsyncResponse = response
    return await a_response_of_llm.text()


async def choose(datasette: Datasette) -> None:
    models = LLM(datasette)
    await models.model()
    await models.model(None, "extract", None)
    for model in await models.models(actor=None, purpose="extract"):
        assert_type(model.model_id, str)
        assert_type(await models.get_key_for_model(model), str | None)
        assert_type(await models.model_has_key(model, actor={"id": 1}, purpose="extract"), bool)


async def many_prompts(datasette: Datasette, rows: AsyncIterator[dict[str, str]]) -> int:
    group: AbstractAsyncContextManager[GroupModel] = LLM(datasette).group(
        "echo", purpose="enrichments", actor=None, concurrency=50, on_error="cancel"
    )
    async with group as model:
        assert_type(model, GroupModel)
        assert_type(model.group, Group)
        async for row, response in model.map(rows, lambda row: f"Summarize: {row['content']}"):
            assert_type(row, dict[str, str])
            assert_type(response, PromptResponse)
        async for number, _ in model.map([1, 2, 3]):
            assert_type(number, int)
        async for bird, _ in model.map(("heron",), lambda bird: {"prompt": bird, "system": "be brief"}):
            assert_type(bird, str)
        model.cancel()
    assert_type(model.stats.prompts_per_second, float)
    return model.stats.succeeded


async def tools_and_turns(datasette: Datasette) -> None:
    model = await LLM(datasette).model("echo")

    def add(one: int, other: int) -> int:
        return one + other

    chain = model.chain("1 + 1?", tools=[add], chain_limit=3)
    async for response in chain.responses():
        assert_type(await response.text(), str)
    async for text in model.chain("1 + 1?", tools=[add]):
        assert_type(text, str)
    assert_type(await model.chain("1 + 1?").text(), str)
    conversation = model.conversation(tools=[add])
    assert_type(conversation, WrappedConversation)
    assert_type(await conversation.prompt("hello"), PromptResponse)


async def errors(datasette: Datasette) -> None:
    try:
        await LLM(datasette).model("nowhere")
    except ModelNotFoundError as error:
        not_found: llm.UnknownModelError = error
        print(not_found)
    except (PromptCancelled, GroupClosed):
        pass


def wrap(model_id: str) -> Callable[[PromptResult], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def wrapper(result: PromptResult) -> AsyncIterator[None]:
        yield
        assert_type(result.response, llm.AsyncResponse | None)
        assert_type(result.responses, list[llm.AsyncResponse])
        assert_type(result.group, Group | None)
        assert_type(result.is_chain, bool)
        assert_type(result.chain_complete, bool)

        async def count(response: llm.AsyncResponse) -> None:
            await response.usage()

        await result.on_response_done(count)
        await result.on_response_done(lambda response: print(response.id))

    return wrapper


def group_exit(group: Group) -> Awaitable[None] | None:
    assert_type(group.model_id, str)
    assert_type(group.purpose, str | None)
    assert_type(group.actor, dict[str, Any] | None)
    assert_type(group.stats.failed, int)
    return None


def purposes(datasette: Datasette) -> list[str]:
    known = [*get_purposes(datasette), Purpose("extract"), Purpose(name="chat", description="Talk")]
    return [f"{purpose.name}: {purpose.description}" for purpose in known]


async def whole_table(datasette: Datasette) -> int:
    async def show(progress: EnrichProgress) -> None:
        assert_type(progress.total, int | None)

    report = await enrich(
        datasette,
        "data",
        "dogs",
        "Which dog is this? {{ text }}",
        schema=Dog,
        where="text is not null",
        options={"temperature": 0.2},
        deadline=3600,
        on_progress=show,
    )
    assert_type(report, EnrichReport)
    await enrich(datasette, "data", "dogs", "{{ text }}", column="summary", on_progress=lambda progress: None)
    return report.written
