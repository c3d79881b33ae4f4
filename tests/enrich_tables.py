"""Small databases for the tests of enrichment."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from datasette.app import Datasette

from datasette_llm.enrich import enrich

from .fakes import FakeModel, registered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def close_datasette(datasette: Any) -> None:
    """Release the connections of a Datasette."""
    if hasattr(datasette, "close"):  # The oldest has no way to close itself that waits for its threads.
        datasette.close()


class TableFile:
    """A database file in a test's directory, and a Datasette that serves it as ``data``."""

    def __init__(self, directory: Path, *statements: str) -> None:
        self.path = str(directory / "data.db")
        for statement in statements:
            self.run(statement)
        self.datasettes: list[Any] = []

    def run(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own, as another program would."""
        with closing(sqlite3.connect(self.path)) as conn, conn:
            return conn.execute(sql, parameters).fetchall()

    def run_many(self, sql: str, rows: Any) -> None:
        with closing(sqlite3.connect(self.path)) as conn, conn:
            conn.executemany(sql, rows)

    def beside(self) -> list[str]:
        """The names of the files in its directory; without the locks that Windows leaves there."""
        names = sorted(os.listdir(os.path.dirname(self.path)))
        return [name for name in names if sys.platform != "win32" or not name.endswith(".lock")]

    def leave_half_written(self, sql: str) -> None:
        """Have a program killed in the middle of this statement, after a part of it reached the disk."""
        script = (
            "import os, sqlite3, sys; conn = sqlite3.connect(sys.argv[1]);"
            "conn.execute('pragma cache_size = 1');"
            "conn.execute(sys.argv[2]); os._exit(9)"
        )
        subprocess.run([sys.executable, "-c", script, self.path, sql], check=False)

    def datasette(self, **kwargs: Any) -> Any:
        datasette = Datasette([self.path], **kwargs)
        self.datasettes.append(datasette)
        return datasette

    async def enrich(self, table: str, prompt: str, **kwargs: Any) -> Any:
        """Enrich with the model ``fake``, which a test registers."""
        kwargs.setdefault("model", "fake")
        return await enrich(self.datasette(), "data", table, prompt, **kwargs)

    def close(self) -> None:
        for datasette in self.datasettes:
            close_datasette(datasette)


@contextmanager
def fake_model(*args: Any, **kwargs: Any) -> Iterator[FakeModel]:
    """Register a `FakeModel` under the id ``fake``, and one that echoes as ``second``."""
    model = FakeModel(*args, **kwargs)
    with registered(model, FakeModel(model_id="second")):
        yield model
