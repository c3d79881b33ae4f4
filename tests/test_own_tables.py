"""Tables of ours in a user's database: who may see them, and that they are no tables to enrich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from datasette_llm.enrich import EnrichInputError

from .enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.real_clock, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

PRIVATE = {"databases": {"data": {"tables": {"secret": {"allow": {"id": "owner"}}}, "allow_sql": False}}}


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(
        tmp_path,
        "create table secret (id integer primary key, body, answer)",
        "insert into secret(body) values ('the password is 1234')",
        "create table open (id integer primary key, body)",
        "create table _llm_later (about)",
    )
    yield file
    file.close()


async def fail_one(file: TableFile) -> None:
    async def answer(prompt: str) -> Any:
        raise ValueError(f"cannot answer {prompt}")
        yield ""

    with fake_model(answer):
        report = await file.enrich("secret", "{{ body }}", column="answer")
    assert report.failed == 1


async def statuses(file: TableFile, config: dict[str, Any], actor: dict[str, Any] | None) -> list[int]:
    datasette = file.datasette(config=config)
    await datasette.invoke_startup()
    paths = ["secret", "open", "_llm_enrich_errors", "_llm_enrich_errors.json", "_llm_later"]
    cookies = {"ds_actor": datasette.client.actor_cookie(actor)} if actor else {}
    return [(await datasette.client.get(f"/data/{path}", cookies=cookies)).status_code for path in paths]


async def test_they_are_no_more_visible_than_any_table_beside_them(file: TableFile) -> None:
    await fail_one(file)
    assert await statuses(file, PRIVATE, None) == [403, 200, 403, 403, 403]
    assert await statuses(file, PRIVATE, {"id": "other"}) == [403, 200, 403, 403, 403]
    assert await statuses(file, PRIVATE, {"id": "owner"}) == [200, 200, 200, 200, 200]


async def test_they_do_not_show_in_lists_either(file: TableFile) -> None:
    await fail_one(file)
    datasette = file.datasette(config=PRIVATE)
    await datasette.invoke_startup()
    listed = (await datasette.client.get("/data.json")).text
    assert "_llm_" not in listed
    assert "open" in listed


async def test_where_every_table_is_public_so_are_they(file: TableFile) -> None:
    await fail_one(file)
    assert await statuses(file, {}, None) == [200, 200, 200, 200, 200]


@pytest.mark.parametrize("name", ["_llm_later", "_LLM_Later"])
async def test_enrich_leaves_them_alone(name: str, file: TableFile) -> None:
    with fake_model() as model, pytest.raises(EnrichInputError, match="a table of this program's own"):
        await file.enrich(name, "{{ about }}", column="answer")
    assert not model.prompts
