"""A job that no row can escape: it stops at once, says why, and leaves the rows and the file as they were."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.lowlevel
import llm
import pytest
from click.testing import CliRunner
from datasette.cli import cli

from datasette_llm.enrich import EnrichInputError, EnrichProgress
from datasette_llm.enrich.refusals import ROWS_ALIKE, normalised
from datasette_llm.enrich.telling.display import line

from .enrich_tables import TableFile, fake_model
from .fakes import FakeModel, registered
from .provider_errors import HOPELESS, error, openai_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_clock


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    """A table ``t`` of 300 rows without an output column."""
    file = TableFile(tmp_path, "create table t (id integer primary key, body)")
    file.run_many("insert into t(body) values (?)", [(f"row {n}",) for n in range(1, 301)])
    yield file
    file.close()


def state(file: TableFile) -> tuple[str, list[str]]:
    """The file's digest, and the names of those beside it."""
    with open(file.path, "rb") as opened:
        return hashlib.sha256(opened.read()).hexdigest(), file.beside()


def refusing(choose: Callable[[str], Exception | None]) -> Callable[[str], AsyncGenerator[str, None]]:
    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        await anyio.lowlevel.checkpoint()
        failure = choose(prompt)
        if failure is not None:
            raise failure
        yield prompt.upper()

    return answer


def number(prompt: str) -> int:
    return int(prompt.split()[1])


def tables(file: TableFile) -> set[str]:
    found = {name for (name,) in file.run("select name from sqlite_master where type = 'table'")}
    return found - {"_llm_runs", "_llm_answers"}  # Of what was answered before.


@pytest.mark.parametrize(
    ("name", "stopped", "words"),
    [
        ("openai key", "key_refused", "the API key is refused"),
        ("openrouter money", "no_money", "Add credit at the provider"),
        ("litellm money behind it", "no_money", "the account has no money left"),
        ("ollama model", "no_model", "Choose another model with --model"),
        ("gemini day", "quota", "--wait-for-quota 14h14m"),
        ("openrouter free", "quota", "--wait-for-quota 24h"),
        ("litellm key", "key_refused", "It says: 400 No connected db."),
        ("litellm model", "no_model", "It says: 400 Invalid model name passed in"),
    ],
)
async def test_it_stops_and_says_what_to_do(file: TableFile, name: str, stopped: str, words: str) -> None:
    before = state(file)
    with fake_model(refusing(lambda prompt: HOPELESS[name][0])) as model:
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=4)
    assert report.stopped == stopped
    assert words in report.summary()
    assert (report.failed, report.written, report.remaining) == (0, 0, 300)
    assert len(model.prompts) <= 4
    assert state(file) == before


async def test_money_that_runs_out_in_the_middle_stops_it_too(file: TableFile) -> None:
    money = HOPELESS["openai money"][0]
    with fake_model(refusing(lambda prompt: money if number(prompt) > 100 else None)) as model:
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=4)
    assert (report.stopped, report.failed, report.written, report.remaining) == ("no_money", 0, 100, 200)
    assert len(model.prompts) <= 104
    assert tables(file) == {"t"}
    with fake_model():
        report = await file.enrich("t", "{{ body }}", column="answer")
    assert (report.stopped, report.written) == (None, 200)


async def test_a_key_that_is_revoked_in_the_middle_stops_it(file: TableFile) -> None:
    revoked = HOPELESS["openai key"][0]
    with fake_model(refusing(lambda prompt: revoked if number(prompt) > 100 else None)) as model:
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=4)
    assert (report.stopped, report.written) == ("key_refused", 100)
    assert len(model.prompts) <= 100 + 3 + 4
    # An answer that was on its way when the first was refused makes that look like a bad moment.
    assert report.failed < 4


async def test_a_bad_moment_of_the_provider_is_one_rows_failure(file: TableFile) -> None:
    refused = HOPELESS["openai key"][0]
    with fake_model(refusing(lambda prompt: refused if number(prompt) == 100 else None)):
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=4)
    assert (report.stopped, report.failed, report.written) == (None, 1, 299)
    assert file.run("select pk from _llm_enrich_errors") == [(100,)]


def refused_in_new_words(prompt: str) -> Exception:
    identifier = hashlib.sha256(prompt.encode()).hexdigest()[:24]
    return openai_error(400, error(f"This deployment is sleeping (request_id: req_{identifier})"))


async def test_first_rows_that_are_refused_alike_stop_it_in_whatever_words(file: TableFile) -> None:
    before = state(file)
    with fake_model(refusing(refused_in_new_words)) as model:
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=4)
    assert (report.stopped, report.failed, report.remaining) == ("refused_alike", 0, 300)
    assert "the provider refused the first rows all alike" in report.summary()
    assert "It says: 400 This deployment is sleeping" in report.summary()
    assert ROWS_ALIKE <= len(model.prompts) <= ROWS_ALIKE + 4
    assert state(file) == before


@pytest.mark.parametrize(
    "words",
    [
        lambda prompt: f"cannot parse {prompt!r}",
        lambda prompt: f"the input has {9_000 + number(prompt)} tokens, 8192 are allowed",
    ],
    ids=["quoted", "counted"],
)
async def test_refusals_that_name_the_row_are_its_own(file: TableFile, words: Callable[[str], str]) -> None:
    def choose(prompt: str) -> Exception | None:
        return openai_error(400, error(words(prompt))) if number(prompt) <= 12 else None

    with fake_model(refusing(choose)):
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=4)
    assert (report.stopped, report.failed, report.written) == (None, 12, 288)
    assert file.run("select count(*) from _llm_enrich_errors") == [(12,)]


@pytest.mark.parametrize("code", ["content_filter", "context_length_exceeded"])
async def test_content_that_is_refused_is_the_rows_own_also_when_it_is_alike(
    file: TableFile, code: str
) -> None:
    def choose(prompt: str) -> Exception | None:
        return openai_error(400, error("no", code)) if number(prompt) <= 50 else None

    with fake_model(refusing(choose)):
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=4)
    assert (report.stopped, report.failed, report.written) == (None, 50, 250)


async def test_one_answer_among_the_first_makes_refusals_the_rows_own(file: TableFile) -> None:
    def choose(prompt: str) -> Exception | None:
        return None if number(prompt) in (7, *range(50, 301)) else refused_in_new_words(prompt)

    with fake_model(refusing(choose)):
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=1)
    assert (report.stopped, report.failed, report.written) == (None, 48, 252)


@pytest.mark.parametrize("rows", [5, ROWS_ALIKE - 1])
async def test_a_small_table_whose_rows_are_all_refused_has_them_recorded(file: TableFile, rows: int) -> None:
    with fake_model(refusing(refused_in_new_words)):
        report = await file.enrich("t", "{{ body }}", column="answer", limit=rows)
    assert (report.stopped, report.failed) == (None, rows)
    assert file.run("select count(*) from _llm_enrich_errors") == [(rows,)]


async def test_first_rows_that_really_are_bad_can_be_passed(file: TableFile) -> None:
    def choose(prompt: str) -> Exception | None:
        return refused_in_new_words(prompt) if number(prompt) <= 20 else None

    with fake_model(refusing(choose)):
        report = await file.enrich("t", "{{ body }}", column="answer", max_failures=50)
    assert (report.stopped, report.failed, report.written) == (None, 20, 280)


async def test_what_a_plugin_or_this_program_does_wrong_is_no_refusal(file: TableFile) -> None:
    def choose(prompt: str) -> Exception | None:
        return RuntimeError("a bug") if number(prompt) <= 20 else None

    with fake_model(refusing(choose)):
        report = await file.enrich("t", "{{ body }}", column="answer")
    assert (report.stopped, report.failed, report.written) == (None, 20, 280)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("refused (request req_011CbrFTcXhtiMzr3s6EocF7)", "refused (request req_022DbrFTcXhtiMzr3s6EocF7)"),
        ("no: 0b9f2c1e-6a4d-4f0e-9d1c-2f3a4b5c6d7e", "no: 1b9f2c1e-6a4d-4f0e-9d1c-2f3a4b5c6d7e"),
        ("down since 2025-01-01T10:00:00Z", "down since 2025-01-01T10:00:07Z"),
    ],
)
def test_what_identifies_a_request_makes_no_other_refusal(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


def test_numbers_and_quotations_do() -> None:
    assert normalised("5012 tokens") != normalised("5013 tokens")
    assert normalised("cannot read 'a'") != normalised("cannot read 'b'")


async def test_a_quota_is_waited_for(file: TableFile) -> None:
    told = False
    seen: list[EnrichProgress] = []

    def choose(prompt: str) -> Exception | None:
        nonlocal told
        if not told and number(prompt) >= 50:
            told = True
            return openai_error(429, error("slow down"), {"retry-after": "1"})
        return None

    config = {"plugins": {"datasette-llm": {"retries": {"timeout": 0.5}}}}
    from datasette_llm import enrich

    with fake_model(refusing(choose)):
        report = await enrich(
            file.datasette(config=config), "data", "t", "{{ body }}", column="answer", model="fake",
            concurrency=4, wait_for_quota=60, on_progress=lambda progress: seen.append(_copy(progress)),
        )  # fmt: skip
    assert (report.stopped, report.failed, report.written, report.retries) == (None, 0, 300, 0)
    assert any("quota used up, waiting until" in line(progress) for progress in seen)
    assert "quota" not in line(seen[-1])


def _copy(progress: EnrichProgress) -> EnrichProgress:
    from dataclasses import replace

    return replace(progress)


class KeyModel(llm.AsyncKeyModel):
    """A model that cannot do without a key."""

    model_id = "keyed"
    needs_key = "keyed"
    key_env_var = "KEYED_API_KEY"
    supports_schema = False

    class Options(llm.Options):
        temperature: float | None = None

    async def execute(self, *args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
        raise AssertionError("nothing is to be sent")
        yield ""


def run(file: TableFile, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["llm", "enrich", file.path, "t", "{{ body }}", *arguments])


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-m", "keyed", "--column", "a"), "needs an API key and there is none"),
        (("-m", "nobody", "--column", "a"), "Unknown model: 'nobody'"),
        (("-m", "keyed", "--key", "k", "--column", "a", "-o", "temprature", "1"), "temprature"),
        (("-m", "keyed", "--key", "k", "--column", "a", "-o", "temperature", "hot"), "temperature"),
        (("-m", "keyed", "--key", "k", "--schema", "name, age int"), "does not support schemas"),
        (("-m", "keyed", "--key", "k", "--column", "a", "--wait-for-quota", "soon"), "is no duration"),
    ],
)
def test_what_cannot_work_is_found_before_the_file_is_touched(
    file: TableFile, arguments: tuple[str, ...], words: str, dry: tuple[str, ...]
) -> None:
    before = state(file)
    with registered(cast("Any", KeyModel())):
        result = run(file, *arguments, *dry)
    assert result.exit_code == 2
    assert words in result.output
    assert state(file) == before


def test_the_command_says_what_to_do_and_how_to_go_on(file: TableFile) -> None:
    before = state(file)
    with registered(FakeModel(refusing(lambda prompt: HOPELESS["openrouter money"][0]))):
        result = run(file, "-m", "fake", "--column", "answer", "--wait-for-quota", "2h")
    assert result.exit_code == 1
    assert "Stopped early: the account has no money left, 300 rows left" in result.output
    assert "It says: 402 Insufficient credits. Add more" in result.output
    assert "--wait-for-quota 7200s" in result.output.split("Go on with:")[1]
    assert state(file) == before


def test_the_report_says_it_as_data(file: TableFile) -> None:
    with registered(FakeModel(refusing(lambda prompt: HOPELESS["gemini day"][0]))):
        result = run(file, "-m", "fake", "--column", "answer", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["stopped"], report["quota_seconds"], report["failed"]) == ("quota", 51_234.5, 0)
    assert "Please retry in 51234.5s" in report["refusal"]


async def test_a_script_gets_an_exception_where_there_is_no_key(file: TableFile) -> None:
    with (
        registered(cast("Any", KeyModel())),
        pytest.raises(EnrichInputError, match="llm keys set keyed, or set KEYED"),
    ):
        await file.enrich("t", "{{ body }}", column="answer", model="keyed")
