"""A server collects what was submitted in batches, by itself, whoever submitted it.

One background task of the server looks now and then how the batches stand that are on record in its
databases, and runs the job that collects them. It sends nothing: a batch that a killed command left on its
way is for that command. It leaves alone what another process is at (`enrich.writing.lock`), so that of two
servers, or a server and a command, one collects.

What only this needs is imported when a database has a batch.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import anyio

from ...access.settings import get_settings

if TYPE_CHECKING:
    from ...enrich.record.batches import BatchRecord

logger = logging.getLogger("datasette_llm")

#: The first look is soon after the start: batches may have been done while no server ran.
FIRST_SECONDS = 3.0
#: Without a setting that asks for it, it is asked again so often whether there is one now.
OFF_SECONDS = 60.0
#: What cannot be collected is tried again after twice the time, up to this.
LONGEST_SECONDS = 3_600.0
#: Nothing but a batch's table says that there are any. (`enrich.record.batches` has the name.)
_TABLE = "_llm_enrich_batches"

_collectors: WeakKeyDictionary[Any, Collector] = WeakKeyDictionary()


async def keep_collecting(datasette: Any) -> None:
    """Collect what is done, again and again, until the server ends."""
    collector = collector_of(datasette)
    await anyio.sleep(min(FIRST_SECONDS, get_settings(datasette).collect_batches or FIRST_SECONDS))
    while True:
        seconds = get_settings(datasette).collect_batches
        if seconds:
            await collector.look(seconds)
        await anyio.sleep(seconds or OFF_SECONDS)


def collector_of(datasette: Any) -> Collector:
    """Return what collects for a server."""
    return _collectors.setdefault(datasette, Collector(datasette))


def trouble_with(datasette: Any, database: str, run: int) -> str | None:
    """Return why this server cannot collect the batches of a run, if it has tried."""
    collector = _collectors.get(datasette)
    trouble = collector.troubles.get((database, run)) if collector is not None else None
    return None if trouble is None else trouble.text


class _Trouble:
    """What keeps the batches of a run from being collected, and when it is tried again."""

    def __init__(self, text: str, seconds: float) -> None:
        self.text = text
        self.seconds = min(seconds, LONGEST_SECONDS)
        self.until = anyio.current_time() + self.seconds


class Collector:
    """Collects for one server.

    Attributes:
        troubles: what could not be collected, by database and run.
    """

    def __init__(self, datasette: Any) -> None:
        self._datasette = datasette
        self.troubles: dict[tuple[str, int], _Trouble] = {}

    async def look(self, seconds: float) -> None:
        """Look how all batches stand, and collect those that are done.

        Args:
            seconds: when it is looked next.
        """
        for database in list(self._datasette.databases.values()):
            if database.path is None or not database.is_mutable:
                continue
            try:
                if await database.table_exists(_TABLE):
                    await self._look_at(database, seconds)
            except Exception:  # A file that is gone, say; others are looked at all the same.
                logger.warning("The batches in %s cannot be looked at", database.name, exc_info=True)

    async def _look_at(self, database: Any, seconds: float) -> None:
        from ...enrich.database import read
        from ...enrich.record.batches import running_batches

        runs: dict[int, list[BatchRecord]] = {}
        for record in await read(database, running_batches):
            runs.setdefault(record.run, []).append(record)
        for run in [run for name, run in self.troubles if name == database.name and run not in runs]:
            del self.troubles[database.name, run]
        for number, records in runs.items():
            trouble = self.troubles.get((database.name, number))
            if trouble is not None and anyio.current_time() < trouble.until:
                continue
            error = await self._collect(database, number, {record.id for record in records})
            if error is None:
                self.troubles.pop((database.name, number), None)
                continue
            if trouble is None or trouble.text != error:
                logger.warning(
                    "The batches of job %d in %s are not collected: %s", number, database.name, error
                )
            waited = seconds if trouble is None else trouble.seconds
            self.troubles[database.name, number] = _Trouble(error, 2 * waited)

    async def _collect(self, database: Any, number: int, batches: set[int]) -> str | None:
        """Run the job that collects; return why it could not."""
        from ...enrich.batches.way import BatchWay
        from ...enrich.database import read
        from ...enrich.errors import EnrichInputError
        from ...enrich.record.runs import list_runs
        from ...enrich.writing.lock import is_held
        from .again import spec_to_collect
        from .live import run_here

        found = await read(database, partial(list_runs, run=number))
        if not found:
            return "the run that submitted them is not on record any more"
        run = found[0]
        if is_held(database, run["table"], run["columns"]):
            return None  # Somebody else is at it.
        try:
            spec = spec_to_collect(run, database.name)
        except EnrichInputError as error:
            return str(error)
        way = BatchWay(self._datasette, only=batches)
        return (await run_here(self._datasette, spec, way)).error
