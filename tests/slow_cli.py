"""The command ``datasette`` with a slow model called ``slow``, for tests that interrupt it.

Every prompt that is asked is a line in the file that PROMPT_LOG names; an answer takes SLOW_SECONDS.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
from datasette.cli import cli

from tests.fakes import FakeModel, registered

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


async def answer(prompt: str) -> AsyncGenerator[str, None]:
    with open(os.environ["PROMPT_LOG"], "a") as log:  # noqa: ASYNC230 - a line, appended in one write
        log.write(prompt + "\n")
    await anyio.sleep(float(os.environ["SLOW_SECONDS"]))
    yield prompt.upper()


if __name__ == "__main__":
    with registered(FakeModel(answer, model_id="slow")):
        cli()
