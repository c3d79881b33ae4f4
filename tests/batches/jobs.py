"""A table, a provider that has batches, and the command about them that is given again and again."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from datasette_llm.enrich import EnrichJob, JobSpec
from datasette_llm.enrich.batches.way import BatchWay

from ..enrich_tables import TableFile
from ..fakes import registered
from ..protocols.gemini import PROTOCOL as GEMINI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.batch_provider import BatchProvider

HOUR = 3_600


class Job:
    """A table of rows, a provider, and the command that is given again and again."""

    def __init__(self, directory: Path, provider: BatchProvider, rows: int = 10) -> None:
        self.file = TableFile(
            directory, "create table t (id integer primary key, text text)", "create table log (id integer)"
        )
        self.file.run_many("insert into t values (?, ?)", [(n, f"row {n}") for n in range(1, rows + 1)])
        self.provider = provider
        self.model_id = "batched"
        self.config: dict[str, Any] = {"prices": {"batched": {"input": 1000, "output": 2000}}}

    async def run(
        self,
        *,
        poll_seconds: float = 0.05,
        on_settled: Callable[[EnrichJob], None] | None = None,
        **asked: Any,
    ) -> Any:
        """Give the command.

        Args:
            on_settled: called with the job when rows have been settled.
        """
        asked = {"prompt": "{{ text }}", "column": "answer", "batch": True, **asked}
        spec = JobSpec(database="data", table="t", model=self.model_id, **asked)
        datasette = self.file.datasette(config={"plugins": {"datasette-llm": self.config}})
        way = BatchWay(datasette, poll_seconds=poll_seconds) if spec.batch else None
        job: EnrichJob

        def settled(outcome: Any) -> None:
            if on_settled is not None:
                on_settled(job)

        job = EnrichJob(datasette, spec, way=way, on_settled=settled)
        return await job.run()

    async def run_later(self, **asked: Any) -> Any:
        """Give the command when the batches are done."""
        self.provider.advance(2 * HOUR)
        return await self.run(**asked)

    def values(self) -> dict[int, str | None]:
        return dict(self.file.run("select id, answer from t"))

    @property
    def expected(self) -> dict[int, str]:
        return {n: f"answer to: {text}" for n, text in self.file.run("select id, text from t")}

    def rows_in_batches(self) -> int:
        return int(self.file.run("select count(*) from _llm_enrich_batch_rows")[0][0])

    def files(self) -> list[str]:
        return sorted(path.name for path in Path(self.file.path).parent.glob("*batch*"))


def openai_model(provider: BatchProvider, model_id: str = "batched") -> Any:
    from llm.default_plugins.openai_models import AsyncChat

    return AsyncChat(
        model_id, model_name="m", key="sk-test", api_base=f"{provider.url}/v1", supports_schema=True
    )


def anthropic_model(provider: BatchProvider) -> Any:
    plugin = pytest.importorskip("llm_anthropic", reason="llm-anthropic is not installed")
    model = plugin.AsyncClaudeMessages("batched", base_url=provider.url)
    model.key = "sk-ant-test"
    return model


def gemini_model(provider: BatchProvider) -> Any:
    return GEMINI.model(provider.url, model_id="batched")


FAMILIES = pytest.mark.parametrize(
    "make", [openai_model, anthropic_model, gemini_model], ids=["openai", "anthropic", "gemini"]
)


@contextmanager
def job_of(make: Any, directory: Path, provider: BatchProvider) -> Iterator[Job]:
    """A job with the model of a family."""
    job, model = Job(directory, provider), make(provider)
    job.model_id = model.model_id
    with registered(model):
        yield job
    job.file.close()
