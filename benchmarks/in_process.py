"""What this package costs without a network: per prompt, per lookup, and in memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import llm
from datasette.app import Datasette

from datasette_llm import LLM

from .memory import resident_mb
from .models import MODEL_ID
from .provider import answer_text
from .ways import open_group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .work import Result, Work


async def instant_plain_llm(work: Work, prompts: list[str], result: Result) -> None:
    """A loop over plain llm, one prompt after the other: nothing can cost less."""
    model = llm.get_async_model(MODEL_ID)
    for prompt in prompts:
        result.check(await model.prompt(prompt).text(), answer_text(prompt))


async def instant_map(work: Work, prompts: list[str], result: Result) -> None:
    """The same through ``map``."""
    async with open_group(work) as model:
        async for prompt, response in model.map(prompts):
            result.check(await response.text(), answer_text(prompt))


async def instant_prompt(work: Work, prompts: list[str], result: Result) -> None:
    """The same through ``prompt()`` in a group."""
    async with open_group(work) as model:
        for prompt in prompts:
            response = await model.prompt(prompt)
            result.check(await response.text(), answer_text(prompt))


async def lookup_llm(work: Work, prompts: list[str], result: Result) -> None:
    """llm's own lookup of a model."""
    for _ in range(work.n):
        llm.get_async_model(MODEL_ID)
    result.right = work.n


async def lookup_facade(work: Work, prompts: list[str], result: Result) -> None:
    """``await LLM(datasette).model()``."""
    facade = LLM(Datasette(memory=True, config={"plugins": {"datasette-llm": {"default_model": MODEL_ID}}}))
    await facade.model()
    result.cpu, result.wall = -time.process_time(), -time.perf_counter()
    for _ in range(work.n):
        await facade.model()
    result.cpu += time.process_time()
    result.wall += time.perf_counter()
    result.right = work.n


async def memory_of_map(work: Work, prompts: list[str], result: Result) -> None:
    """Memory while ``map`` goes over very many items that are made as it asks for them."""
    marks = {max(1, work.n * percent // 100): f"{percent} %" for percent in (1, 20, 100)}

    def items() -> Iterator[str]:
        for number in range(work.n):
            yield f"item {number}"

    async with open_group(work) as model:
        done = 0
        async for item, response in model.map(items()):
            result.check(await response.text(), answer_text(item))
            done += 1
            if done in marks:
                result.extra[marks[done]] = round(resident_mb(), 1)
