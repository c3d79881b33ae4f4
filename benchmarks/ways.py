"""The ways to have the same prompts answered over HTTP: this package, and what it is compared with.

Every one gets the same prompts, checks every answer and counts every failure. None of the
comparisons retries more than its libraries do by themselves.
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import aiometer
import anyio
import llm
import openai
from datasette.app import Datasette

from datasette_llm import LLM

from .models import KEY, MODEL_ID
from .provider import answer_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from .work import Result, Work


def open_group(work: Work) -> AbstractAsyncContextManager[Any]:
    """Return a group as a plugin opens one."""
    config = {"default_model": MODEL_ID, **work.config}
    datasette = Datasette(memory=True, config={"plugins": {"datasette-llm": config}})
    group: AbstractAsyncContextManager[Any] = LLM(datasette).group(concurrency=work.concurrency)
    return group


async def through_map(work: Work, prompts: list[str], result: Result) -> None:
    """``model.map()``: what bulk work uses."""
    more = {"stream": True} if work.stream else {}
    async with open_group(work) as model:
        async for prompt, response in model.map(prompts, **more):
            try:
                result.check(await response.text(), answer_text(prompt))
            except Exception as error:
                result.fail(error)
        stats = model.stats
        result.extra |= {
            name: getattr(stats, name)
            for name in ("retries", "throttled_seconds", "concurrency", "input_tokens", "output_tokens")
        }


async def through_prompt(work: Work, prompts: list[str], result: Result) -> None:
    """``model.prompt()`` for each, in a group; read by as many tasks each as the work says."""
    firsts: list[float] = []
    chunks = 0

    async def read(response: Any, prompt: str, asked: float) -> None:
        nonlocal chunks
        pieces: list[str] = []
        try:
            async for piece in response:
                if not pieces:
                    firsts.append(time.perf_counter() - asked)
                pieces.append(piece)
        except Exception as error:
            result.fail(error)
        else:
            chunks += len(pieces)
            result.check("".join(pieces), answer_text(prompt))

    async with open_group(work) as model, anyio.create_task_group() as readers:
        for prompt in prompts:
            asked = time.perf_counter()
            response = await model.prompt(prompt, stream=work.stream)
            for _ in range(work.readers):
                readers.start_soon(read, response, prompt, asked)
    result.extra |= {"chunks": chunks, "first_chunk": median(firsts) if firsts else None}


async def through_plain_llm(work: Work, prompts: list[str], result: Result) -> None:
    """Plain llm with a semaphore, as its documentation has one prompt."""
    firsts: list[float] = []
    chunks = 0

    async def one(prompt: str) -> None:
        nonlocal chunks
        asked = time.perf_counter()
        response = llm.get_async_model(MODEL_ID).prompt(prompt, stream=work.stream)
        text = ""
        async for piece in response:
            if not text:
                firsts.append(time.perf_counter() - asked)
            text += piece
            chunks += 1
        result.check(text, answer_text(prompt))

    await _at_most(work.concurrency or 100, one, prompts, result)
    result.extra |= {"chunks": chunks, "first_chunk": median(firsts) if firsts else None}


async def through_openai(work: Work, prompts: list[str], result: Result) -> None:
    """A loop over one shared openai client: the least that real HTTP can cost with it."""
    async with openai.AsyncOpenAI(base_url=work.url, api_key=KEY) as client:

        async def one(prompt: str) -> None:
            result.check(await _ask(client, prompt, stream=work.stream), answer_text(prompt))

        await _at_most(work.concurrency or 100, one, prompts, result)


async def through_aiometer(work: Work, prompts: list[str], result: Result) -> None:
    """One shared openai client, its answers as they come from ``aiometer.amap()``."""
    async with openai.AsyncOpenAI(base_url=work.url, api_key=KEY) as client:

        async def one(prompt: str) -> tuple[str, str | Exception]:
            # One that raises would end all others.
            try:
                return prompt, await _ask(client, prompt, stream=work.stream)
            except Exception as error:
                return prompt, error

        async with aiometer.amap(one, prompts, max_at_once=work.concurrency or 100) as answers:
            async for prompt, answer in answers:
                if isinstance(answer, Exception):
                    result.fail(answer)
                else:
                    result.check(answer, answer_text(prompt))


async def _ask(client: openai.AsyncOpenAI, prompt: str, *, stream: bool) -> str:
    messages: Any = [{"role": "user", "content": prompt}]
    if not stream:
        answer = await client.chat.completions.create(model=MODEL_ID, messages=messages)
        return answer.choices[0].message.content or ""
    text = ""
    async with await client.chat.completions.create(
        model=MODEL_ID, messages=messages, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        async for chunk in chunks:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
    return text


async def _at_most(
    concurrency: int, one: Callable[[str], Awaitable[None]], prompts: list[str], result: Result
) -> None:
    limiter = anyio.CapacityLimiter(concurrency)

    async def bounded(prompt: str) -> None:
        async with limiter:
            try:
                await one(prompt)
            except Exception as error:
                result.fail(error)

    async with anyio.create_task_group() as tasks:
        for prompt in prompts:
            tasks.start_soon(bounded, prompt)
