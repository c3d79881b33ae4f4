"""Seeing first: a few rows tried, and what the whole would take, before anything is paid for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner
from datasette.cli import cli

from datasette_llm.enrich import JobSpec, enrich, estimate
from datasette_llm.enrich.estimate import estimate_job, survey
from datasette_llm.enrich.plan import make_plan
from datasette_llm.enrich.reading import selection
from datasette_llm.enrich.trial import in_words, try_rows

from .enrich_tables import TableFile
from .fakes import FakeModel, registered

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

OURS: dict[str, Any] = {"prices": {"fake": {"input": 1_000_000, "output": 2_000_000}}}
PRICES = {"plugins": {"datasette-llm": OURS}}


class Counting(FakeModel):
    """Takes a token for five characters, and two for its answer."""

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[Any, None]:
        self.prompts.append(prompt.prompt)
        yield f"about {prompt.prompt}"
        response.set_usage(input=len(prompt.prompt) // 5, output=2)


@pytest.fixture
def file(tmp_path: Path) -> TableFile:
    file = TableFile(tmp_path, "create table t (id integer primary key, body text)")
    file.run_many("insert into t values (?, ?)", [(i, f"row {i:03d} ..") for i in range(1, 101)])
    return file


def spec(**changes: Any) -> JobSpec:
    given = {"database": "data", "table": "t", "prompt": "{{ body }}", "column": "answer", "model": "fake"}
    return JobSpec(**{**given, **changes})


def digest(file: TableFile) -> str:
    return hashlib.sha256(Path(file.path).read_bytes()).hexdigest()


@pytest.mark.real_clock
async def test_rows_from_all_of_the_table_are_tried_and_nothing_is_written(file: TableFile) -> None:
    before, model = digest(file), Counting()
    with registered(model):
        trial = await try_rows(file.datasette(config=PRICES), spec(), 4)
    assert [tried.pk for tried in trial.answers] == [(13,), (38,), (63,), (88,)]
    assert trial.answers[0].values == {"answer": "about row 013 .."}
    assert [tried.cost for tried in trial.answers] == [6.0] * 4
    [whole] = trial.estimates
    assert (whole.rows, whole.input_tokens, whole.output_tokens, whole.cost) == (100, 200, 200, 600.0)
    assert (whole.input_error, whole.basis) == (0, "try")
    assert digest(file) == before


@pytest.mark.real_clock
async def test_models_are_compared_on_the_same_rows(file: TableFile) -> None:
    with registered(Counting(), Counting(model_id="other")):
        trial = await try_rows(file.datasette(config=PRICES), spec(), 2, ["fake", "other"])
    assert [(tried.model, tried.pk) for tried in trial.answers] == [
        ("fake", (26,)),
        ("other", (26,)),
        ("fake", (76,)),
        ("other", (76,)),
    ]
    assert [whole.cost for whole in trial.estimates] == [600.0, None]
    for width in (40, 80):
        shown = in_words(trial, width)
        assert max(map(len, shown.splitlines())) <= width
        assert "no price known" in shown


@pytest.mark.real_clock
async def test_what_a_row_fails_with_is_shown_and_nothing_is_recorded(file: TableFile) -> None:
    async def fail(prompt: str) -> AsyncGenerator[Any, None]:
        raise ValueError("not today")
        yield ""

    before = digest(file)
    with registered(FakeModel(fail)):
        trial = await try_rows(file.datasette(), spec(), 2)
    assert [tried.error for tried in trial.answers] == ["not today"] * 2
    assert digest(file) == before


@pytest.mark.real_clock
async def test_an_estimate_sends_nothing_and_knows_better_after_a_run(file: TableFile) -> None:
    before, model = digest(file), Counting()
    with registered(model):
        found = await estimate_job(file.datasette(config=PRICES), spec())
        assert model.prompts == []
        assert digest(file) == before
        assert (found.rows, found.input_tokens, found.output_tokens, found.basis) == (
            100,
            250,
            None,
            "characters",
        )
        assert found.input_error == 0.25
        await file.enrich("t", "{{ body }}", column="answer", limit=20)
        found = await estimate_job(file.datasette(config=PRICES), spec())
    assert (found.rows, found.input_tokens, found.output_tokens) == (80, 160, 160)
    assert (found.cost, found.input_cost, found.basis) == (480.0, 160.0, "earlier runs")


def command(file: TableFile, tmp_path: Path, *arguments: str, **ours: Any) -> Any:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"plugins": {"datasette-llm": {**OURS, **ours}}}))
    words = ["llm", "enrich", file.path, "t", "{{ body }}", "--column", "answer", "--config", str(config)]
    return CliRunner().invoke(cli, [*words, *arguments])


def test_the_command_says_what_all_would_take_and_how_to_run_it(file: TableFile, tmp_path: Path) -> None:
    with registered(Counting()):
        done = command(file, tmp_path, "--try", "2", "-m", "fake")
        assert done.exit_code == 0, done.output
        assert "$600.00" in done.output
        assert done.output.rstrip().endswith("--model fake --config " + str(tmp_path / "config.yaml"))
        data = json.loads(command(file, tmp_path, "--try", "2", "-m", "fake", "--json").stdout)
        assert data["answers"][0]["cost"] == 6.0
        assert data["estimates"][0]["cost"] == 600.0
        data = json.loads(command(file, tmp_path, "--estimate", "-m", "fake", "--json").stdout)
        assert (data["rows"], data["cost"]) == (100, 250.0)


def test_above_the_limit_nobody_who_could_be_asked_means_no(file: TableFile, tmp_path: Path) -> None:
    model = Counting()
    with registered(model):
        done = command(file, tmp_path, "-m", "fake", confirm_above=100)
        assert done.exit_code == 2
        assert "--yes" in done.output
        assert model.prompts == []
        done = command(file, tmp_path, "-m", "fake", confirm_above=250)
        assert done.exit_code == 0, done.output
        file.run("update t set answer = null")
        done = command(file, tmp_path, "-m", "fake", "--yes", "--no-reuse", confirm_above=1)
        assert done.exit_code == 0, done.output


@pytest.mark.real_clock
async def test_of_stale_rows_those_of_each_model_are_tried_and_counted(file: TableFile) -> None:
    datasette = file.datasette(config=PRICES)
    with registered(Counting(), Counting(model_id="other")):
        await enrich(datasette, "data", "t", "{{ body }}", column="answer", model="fake", limit=50)
        file.run("update t set body = 'edited ..' || id where id <= 4")
        trial = await try_rows(datasette, spec(stale=True), 2, ["other", "fake"])
        none = await try_rows(datasette, spec(stale=True, where="id > 4"), 2)
    assert [whole.rows for whole in trial.estimates] == [50, 4]
    assert (trial.waiting, {tried.pk for tried in trial.answers}) == (4, {(2,), (4,)})
    assert (none.waiting, none.answers) == (0, [])


@pytest.mark.real_clock
async def test_rows_whose_answers_were_known_cost_nothing(file: TableFile) -> None:
    datasette = file.datasette(config=PRICES)
    with registered(Counting()):
        await enrich(datasette, "data", "t", "{{ body }}", column="answer", model="fake", limit=2)
        file.run("update t set body = 'row 001 ..' where id > 98")
        report = await enrich(
            datasette, "data", "t", "{{ body }}", column="answer", model="fake", where="id > 98"
        )
    assert (report.written, report.reused, report.cost, report.saved_cost) == (2, 2, 0.0, 12.0)


def test_of_a_model_without_a_price_nobody_knows_whether_it_is_too_much(
    file: TableFile, tmp_path: Path
) -> None:
    with registered(Counting(model_id="unlisted")):
        done = command(file, tmp_path, "-m", "unlisted", confirm_above=1)
    assert done.exit_code == 2
    assert "no price known: nobody knows whether that is above confirm_above ($1)" in done.output


def test_an_estimate_of_nothing_says_so(file: TableFile, tmp_path: Path) -> None:
    with registered(Counting()):
        done = command(file, tmp_path, "-m", "fake", "--estimate", "--where", "id > 1000")
    assert done.stdout == "No row is waiting for a value: nothing would be sent to fake\n"


def test_where_no_answer_is_stale_it_is_said_so(file: TableFile, tmp_path: Path) -> None:
    with registered(Counting()):
        command(file, tmp_path, "-m", "fake", "--limit", "3")
        told = [
            command(file, tmp_path, "-m", "fake", "--stale", *more).output
            for more in ([], ["--dry-run"], ["--estimate"], ["--try", "2"])
        ]
    assert ["no answer in t (answer) is stale" in text.lower() for text in told] == [True, True, False, True]
    assert "No answer is stale: nothing would be sent to fake" in told[2]
    assert "is waiting" not in "".join(told)


def test_of_several_models_a_run_takes_the_last_and_says_so(file: TableFile, tmp_path: Path) -> None:
    first, last = Counting(), Counting(model_id="last")
    with registered(first, last):
        done = command(file, tmp_path, "-m", "fake", "-m", "last", "--limit", "2")
    assert done.exit_code == 0
    assert "Several -m are compared by --try N; this asks last, the last one." in done.stderr
    assert (len(first.prompts), len(last.prompts)) == (0, 2)


def test_a_trial_shows_what_is_attached(file: TableFile, tmp_path: Path) -> None:
    (tmp_path / "seen.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    seeing = Counting()
    seeing.attachment_types = {"image/png"}
    picture = str(tmp_path / "{% if id %}seen{% endif %}.png")
    with registered(seeing):
        done = command(file, tmp_path, "-m", "fake", "--try", "1", "-a", picture)
        data = command(file, tmp_path, "-m", "fake", "--try", "1", "-a", picture, "--json")
    shown = "".join(done.output.split())
    assert "seen.png" in shown, done.output
    assert json.loads(data.stdout)["answers"][0]["attachments"] == [str(tmp_path / "seen.png")]


def test_the_command_stops_at_max_cost_and_says_how_to_go_on(file: TableFile, tmp_path: Path) -> None:
    with registered(Counting()):
        done = command(file, tmp_path, "-m", "fake", "--max-cost", "60", "--concurrency", "1")
    assert done.exit_code == 0
    assert "the limit to the cost is reached" in done.output
    assert "Go on with:" in done.output


@pytest.mark.real_clock
async def test_of_a_long_table_a_few_rows_from_everywhere_are_rendered(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "ALL_ROWS", 50)
    monkeypatch.setattr(selection, "COUNT_ROWS", 10)
    with registered(Counting()):
        plan = await make_plan(file.datasette(), spec())
        found = await survey(plan, 20)
    assert found.rows == 100
    places = [each.position for each in found.sample]
    # Ten stretches; the last one is a single row.
    assert (len(places), places[:4], places[-1]) == (19, [1, 2, 12, 13], 100)
    assert [each.key for each in found.sample] == [(each.position,) for each in found.sample]
