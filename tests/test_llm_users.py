"""What llm's users expect of a job: llm's default model, and llm's log."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest
from click.testing import CliRunner
from datasette.cli import cli
from llm.cli import cli as llm_cli

from datasette_llm.enrich import EnrichJob, JobSpec, enrich

from .enrich_tables import TableFile, fake_model
from .fakes import FakeModel, registered

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_clock


@pytest.fixture
def llm_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "llm"
    home.mkdir()
    monkeypatch.setenv("LLM_USER_PATH", str(home))
    return home


@pytest.fixture
def file(tmp_path: Path, llm_home: Path) -> Iterator[TableFile]:
    file = TableFile(tmp_path, "create table t (id integer primary key, body text, answer text)")
    file.run_many("insert into t (body) values (?)", [(f"row {n}",) for n in range(1, 121)])
    yield file
    file.close()


def run(file: TableFile, *arguments: str, prompt: str = "{{ body }}") -> Any:
    return CliRunner().invoke(
        cli, ["llm", "enrich", file.path, "t", prompt, "--column", "answer", *arguments]
    )


def test_llms_default_model_is_the_last_resort(file: TableFile, tmp_path: Path) -> None:
    with fake_model() as model:
        done = run(file, "--limit", "1")
        assert done.exit_code == 2
        for word in ("default_model", "-m", "llm models default"):
            assert word in done.output
        llm.set_default_model("fake")
        assert run(file, "--limit", "1").exit_code == 0
        assert run(file, "--try", "1").exit_code == 0
        assert model.prompts == ["row 1", "row 61"]
        config = tmp_path / "c.yaml"
        config.write_text("plugins: {datasette-llm: {default_model: second}}")
        done = run(file, "--limit", "1", "--config", str(config))
    assert "written with second" in done.output


def test_responses_are_found_by_llm_logs(file: TableFile) -> None:
    with fake_model():
        done = run(file, "-m", "fake", "--log", "-s", "Be brief")
        assert done.exit_code == 0, done.output
        logged = json.loads(CliRunner().invoke(llm_cli, ["logs", "list", "--json", "-n", "0"]).output)
    assert {(each["prompt"], each["response"]) for each in logged} == {
        (f"row {n}", file.run("select answer from t where id = ?", [n])[0][0]) for n in range(1, 121)
    }
    assert {each["system"] for each in logged} == {"Be brief"}


async def test_a_log_that_cannot_be_written_costs_no_answer(
    file: TableFile, llm_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (llm_home / "logs.db").mkdir()
    spec = JobSpec(database="data", table="t", prompt="{{ body }}", column="answer", model="fake", log=True)
    with fake_model():
        report = await EnrichJob(file.datasette(), spec).run()
    assert (report.written, report.failed, report.stopped) == (120, 0, None)
    [told] = [record.message for record in caplog.records if "llm logs" in record.message]
    assert told.endswith("OperationalError: unable to open database file; the job goes on")


@pytest.mark.parametrize(
    ("prompt", "overwrite", "doubt"),
    [("Hello", False, "uses no column"), ("{{ answer }}", True, "is made from 'answer', which --overwrite")],
)
def test_what_is_hardly_meant_is_said(file: TableFile, prompt: str, overwrite: bool, doubt: str) -> None:
    with fake_model():
        done = run(file, "-m", "fake", "--dry-run", *(["--overwrite"] if overwrite else []), prompt=prompt)
    assert done.exit_code == 0
    assert doubt in done.output
    with fake_model():
        assert "hardly" not in run(file, "-m", "fake", "--dry-run").output


class Costly(FakeModel):
    """Has ten answers, and no more."""

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[Any, None]:
        if int(prompt.prompt.split()[1]) > 10:
            await anyio.sleep_forever()
        yield "said"
        response.set_usage(input=3, output=1)


async def test_a_run_that_never_ended_shows_what_its_answers_cost(file: TableFile) -> None:
    prices = {"fake": {"input": 1_000_000, "output": 2_000_000}}
    datasette = file.datasette(config={"plugins": {"datasette-llm": {"prices": prices}}})
    with registered(Costly()), anyio.CancelScope() as scope:

        def look(progress: Any) -> None:
            if progress.done == 10:
                scope.cancel()

        await enrich(datasette, "data", "t", "{{ body }}", column="answer", model="fake", on_progress=look)
    assert file.run("select written, cost, ended from _llm_runs") == [(10, 50.0, None)]


async def test_the_summary_says_what_questions_asked_once_have_saved(file: TableFile) -> None:
    file.run("update t set body = 'row 1'")
    prices = {"fake": {"input": 1_000_000, "output": 2_000_000}}
    datasette = file.datasette(config={"plugins": {"datasette-llm": {"prices": prices}}})
    with registered(Costly()):
        report = await enrich(datasette, "data", "t", "{{ body }}", column="answer", model="fake")
    assert (report.cost, report.saved_cost) == (5.0, 119 * 5.0)
    assert "119 prompts and 476 tokens saved, $595.00" in report.summary()
