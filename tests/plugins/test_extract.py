"""datasette-extract: rows are written while the model's answer still arrives."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from datasette.app import Datasette

from ..fakes import FakeModel, registered
from ..patience import PATIENCE_SECONDS

datasette_extract = pytest.importorskip("datasette_extract", reason="datasette-extract is not installed")

# Datasette's database uses threads, and this plugin is asyncio.
pytestmark = [pytest.mark.real_clock, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

PROPERTIES = {"name": {"type": "string", "description": ""}}


class Extractor(FakeModel):
    """Answers with two items, the second one when it may go on; then ends well or not."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.go_on = anyio.Event()
        # A list, since the model that runs is a copy of this one.
        self.seen: list[Any] = []

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
        self.seen.append(prompt)
        yield '{"items": [{"name": "Ana"}'
        yield ', {"name": '
        await self.go_on.wait()
        if self.error:
            raise self.error
        yield '"Ben"}]}'


async def extract(datasette: Datasette) -> None:
    await datasette_extract.extract_table_task(
        datasette, "fake", "data", "people", PROPERTIES, "Names only", "Ana and Ben", None, "task"
    )


async def names(datasette: Datasette) -> list[str]:
    database = datasette.get_database("data")
    if not await database.table_exists("people"):
        return []
    return [row["name"] for row in await database.execute("select name from people order by rowid")]


@pytest.mark.parametrize("error", [None, ZeroDivisionError("half-way")])
async def test_rows_arrive_while_the_answer_streams(error: Exception | None) -> None:
    model = Extractor(error)
    datasette = Datasette()
    datasette.add_memory_database("extract-" + str(bool(error)), name="data")
    with registered(model):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(extract, datasette)
            with anyio.fail_after(PATIENCE_SECONDS):
                while await names(datasette) != ["Ana"]:  # noqa: ASYNC110 - the database has no event for it
                    await anyio.sleep(0.01)
            # The model has not said the second name yet.
            model.go_on.set()
    assert await names(datasette) == (["Ana"] if error else ["Ana", "Ben"])
    [run] = await datasette.get_database("data").execute("select error, num_items from _datasette_extract")
    assert tuple(run) == (("half-way", 1) if error else (None, 2))
    [prompt] = model.seen
    assert prompt.system == "Names only"
    assert json.dumps(PROPERTIES["name"]) in json.dumps(prompt.schema)


async def test_offers_the_models_that_know_schemas() -> None:
    class Plain(FakeModel):
        supports_schema = False

    with registered(FakeModel(), Plain(model_id="plain")):
        models = await datasette_extract._get_available_models(Datasette())
    ids = [model.model_id for model in models]
    assert "fake" in ids
    assert "plain" not in ids
