"""Running jobs through datasette-enrichments' own pages, for the tests of what is offered there."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from datasette.app import Datasette
from datasette.plugins import pm

pytest.importorskip("datasette_enrichments", reason="datasette-enrichments is not installed")

import datasette_enrichments  # not installed everywhere

from ..patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: A job that has not come so far by then hangs.
POLL_SECONDS = 0.02

ANA = {"id": "ana", "name": "Ana"}


def register(*plugins: Any) -> None:
    """Register datasette-enrichments and plugins of it, until the test ends."""
    for plugin in (datasette_enrichments, *plugins):
        pm.register(plugin)


class Site:
    """A Datasette that serves one database file as ``data``; ``ana`` may enrich and edit in it.

    Its actors are known by id, as an authentication plugin would have it.
    """

    def __init__(
        self,
        directory: Path,
        *statements: str,
        settings: dict[str, Any] | None = None,
        permissions: dict[str, Any] | None = None,
        **plugins: Any,
    ) -> None:
        self.path = str(directory / "data.db")
        for statement in statements:
            self.run(statement)
        if permissions is None:
            permissions = {"enrichments": {"id": "ana"}, "update-row": {"id": "ana"}}
            permissions["alter-table"] = {"id": "ana"}
        named = {name.replace("_", "-"): value for name, value in plugins.items()}
        self.datasette = Datasette(
            [self.path],
            config={
                "plugins": {"datasette-llm": {"default_model": "fake", **(settings or {})}, **named},
                "permissions": permissions,
            },
        )

    def run(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own."""
        with closing(sqlite3.connect(self.path)) as conn, conn:
            return conn.execute(sql, parameters).fetchall()

    async def get(self, path: str, actor: dict[str, Any] | None = ANA) -> Any:
        return await self.datasette.client.get(path, **({"actor": actor} if actor else {}))

    async def post(
        self, path: str, data: dict[str, Any] | None = None, actor: dict[str, Any] | None = ANA
    ) -> Any:
        return await self.datasette.client.post(path, data=data or {}, **({"actor": actor} if actor else {}))

    def job(self, job_id: int) -> dict[str, Any]:
        with closing(sqlite3.connect(self.path)) as conn:
            conn.row_factory = sqlite3.Row
            found = conn.execute("select * from _enrichment_jobs where id = ?", [job_id]).fetchone()
        return {**found, "config": json.loads(found["config"])}

    def jobs(self) -> int:
        """How many jobs there have been."""
        tables = self.run("select name from sqlite_master where name = '_enrichment_jobs'")
        return int(self.run("select count(*) from _enrichment_jobs")[0][0]) if tables else 0

    async def until(self, is_so: Callable[[dict[str, Any]], bool], job_id: int = 1) -> dict[str, Any]:
        """Wait until a job is as told; datasette-enrichments tells nobody about a job that pauses."""
        with anyio.fail_after(PATIENCE_SECONDS):
            while not is_so(job := self.job(job_id)):  # noqa: ASYNC110  # there is nothing else to ask
                await anyio.sleep(POLL_SECONDS)
        return job

    async def ended(self, job_id: int = 1) -> dict[str, Any]:
        return await self.until(lambda job: job["status"] not in ("pending", "running"), job_id)
