"""``datasette llm``: what a person types, sees, interrupts and gets back."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result
from datasette.cli import cli
from pluggy import HookimplMarker

from datasette_llm import Purpose
from datasette_llm.enrich import demo
from datasette_llm.hookspecs import plugin_manager

from .enrich_tables import TableFile, fake_model
from .patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.real_clock
ROOT = Path(__file__).parent.parent


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(tmp_path, "create table t (id integer primary key, body, answer)")
    file.run_many("insert into t(body) values (?)", [(f"row {n}",) for n in range(1, 6)])
    yield file
    file.close()


def run(*arguments: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, ["llm", *arguments], **kwargs)


def run_enrich(file: TableFile, *arguments: str, prompt: str = "{{ body }}", **kwargs: Any) -> Result:
    return run("enrich", file.path, "t", prompt, "-m", "fake", *arguments, **kwargs)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_enrich_and_again(backend: str, file: TableFile) -> None:
    with fake_model() as model:
        first = run_enrich(file, "--column", "answer", "--backend", backend)
        again = run_enrich(file, "--column", "answer", "--backend", backend)
    assert first.exit_code == again.exit_code == 0
    assert "5 rows of t (answer) written with fake" in first.stdout
    assert "rows/s" in first.stdout
    assert f"datasette {file.path}   then /data/t" in first.stdout
    assert "Nothing left to do" in again.stdout
    assert len(model.prompts) == 5


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_after_a_kill_in_the_middle_of_a_write_the_same_command_goes_on(
    backend: str, file: TableFile, tmp_path: Path
) -> None:
    file.run_many("insert into t(body) values (?)", [(f"{number} " + "x" * 4_000,) for number in range(50)])
    file.leave_half_written("update t set answer = body")
    assert (tmp_path / "data.db-journal").exists()
    with fake_model() as model:
        result = run_enrich(file, "--column", "answer", "--backend", backend)
    assert result.exit_code == 0, result.output
    assert len(model.prompts) == 55


def test_failed_rows_exit_1_with_counts_and_a_way_on(file: TableFile) -> None:
    async def answer(prompt: str) -> Any:
        if prompt in ("row 2", "row 3"):
            raise ValueError("bad luck")
        yield prompt

    with fake_model(answer):
        result = run_enrich(file, "--column", "answer", "--key", "sk-secret-1", "--deadline", "1h30m")
    assert result.exit_code == 1
    assert "2 rows failed" in result.stdout
    assert "2 x error (ValueError), for instance row 2: bad luck" in result.stdout
    assert "--deadline 5400s" in result.stdout
    assert "--key YOUR_KEY" in result.stdout
    assert "sk-secret-1" not in result.output


def test_json_is_all_there_is_on_stdout(file: TableFile) -> None:
    with fake_model():
        result = run_enrich(file, "--column", "answer", "--json", "--limit", "2")
    assert json.loads(result.stdout)["written"] == 2


def test_quiet_says_nothing(file: TableFile) -> None:
    with fake_model():
        result = run_enrich(file, "--column", "answer", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_dry_run_shows_the_first_prompts(file: TableFile) -> None:
    with fake_model() as model:
        result = run_enrich(file, "--column", "answer", "--dry-run", prompt="Say {{ body }}")
    assert "5 rows of t (answer) would be sent to fake" in result.stdout
    assert "--- prompt 3 ---\nSay row 3" in result.stdout
    assert model.prompts == []


def test_schema_options_and_a_prompt_from_standard_input(file: TableFile) -> None:
    async def answer(prompt: str) -> Any:
        yield json.dumps({"name": prompt, "size": 3})

    with fake_model(answer):
        result = run_enrich(
            file, "--schema", "name, size int", "-o", "temperature", "0.5", "-s", "Be brief",
            prompt="-", input="From stdin: {{ body }}",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert file.run("select name, size from t limit 1") == [("From stdin: row 1", 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Say where the answers go"),
        (["--column", "id"], "part of the primary key"),
        (["--column", "answer", "--deadline", "soon"], "'soon' is no duration"),
        (["--column", "answer", "--limit", "0"], "0 is not in the range"),
        (["--column", "answer", "-m", "nonesuch"], "nonesuch"),
        (["--column", "answer", "--where", "nope = 1"], "no such column: nope"),
        (["--column", "answer", "-o", "temp", "1"], "option 'temp' is not right"),
    ],
)
def test_what_cannot_be_run_exits_2(arguments: list[str], message: str, file: TableFile) -> None:
    with fake_model() as model:
        result = run_enrich(file, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert model.prompts == []
    assert "Traceback" not in result.output


def test_a_file_that_is_no_database_is_said_once(tmp_path: Path) -> None:
    other = tmp_path / "notes.db"
    other.write_text("not a database, but long enough to be looked at" * 10)
    result = run("enrich", str(other), "t", "{{ body }}", "--column", "answer")
    assert result.exit_code == 2
    assert result.stderr == f"Error: {other} is no SQLite database\n"


def test_rows_with_nothing_to_ask_are_no_failure(file: TableFile) -> None:
    file.run("update t set body = ' ' where id > 1")
    with fake_model():
        result = run_enrich(file, "--column", "answer", "--limit", "3")
    assert result.exit_code == 0, result.output
    assert "1 row of t (answer) written" in result.stdout
    assert "4 rows skipped: nothing to ask" in result.stdout
    assert "Go on with" not in result.output


def test_empty_answers_fail_until_they_are_allowed(file: TableFile) -> None:
    async def answer(prompt: str) -> Any:
        yield " "

    with fake_model(answer):
        failed = run_enrich(file, "--column", "answer", "--limit", "2")
        allowed = run_enrich(file, "--column", "answer", "--retry-failed", "--allow-empty", "--allow-cut")
    assert (failed.exit_code, allowed.exit_code) == (1, 0)
    assert "2 x empty" in failed.stdout
    assert "--limit" not in failed.output.partition("Go on with")[2]
    assert file.run("select distinct answer from t where answer is not null") == [("",)]


def test_a_plugin_that_breaks_is_named_without_a_traceback(file: TableFile) -> None:
    class Plugin:
        __name__ = "broken"

        @staticmethod
        def llm_filter_models() -> list[Any]:
            raise RuntimeError("the price list is away")

    HookimplMarker("datasette")(Plugin.llm_filter_models)
    plugin_manager().register(Plugin())
    with fake_model():
        result = run_enrich(file, "--column", "answer")
    assert result.exit_code == 1
    assert "RuntimeError: the price list is away" in result.stderr
    assert "test_cli.py, line" in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_configuration_problems_exit_2(file: TableFile, tmp_path: Path) -> None:
    config = tmp_path / "datasette.yaml"
    with fake_model():
        for text, message in [
            ("plugins: {datasette-llm: {defualt_model: x}}", "did you mean"),
            ("- a list", "does not hold a mapping"),
            ("a: [", "no configuration file"),
        ]:
            config.write_text(text)
            result = run_enrich(file, "--column", "answer", "--config", str(config))
            assert result.exit_code == 2, result.output
            assert message in result.stderr


def test_the_configuration_chooses_the_model_for_the_purpose(file: TableFile, tmp_path: Path) -> None:
    config = tmp_path / "datasette.yaml"
    config.write_text("plugins: {datasette-llm: {purposes: {enrichments: {model: second}}}}")
    with fake_model():
        result = run(
            "enrich", file.path, "t", "{{ body }}", "--column", "answer", "--config", str(config), "--json"
        )
    assert json.loads(result.stdout)["model"] == "second"


def test_trio_without_its_packages_says_what_to_install(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trio_asyncio", None)
    with fake_model():
        result = run_enrich(file, "--column", "answer", "--backend", "trio")
    assert result.exit_code == 2
    assert "pip install 'datasette-llm[trio]'" in result.stderr


def test_a_key_may_be_the_name_of_a_stored_one(file: TableFile, llm_user_path: Path) -> None:
    (llm_user_path / "keys.json").write_text(json.dumps({"mine": "sk-stored"}))

    async def answer(prompt: str) -> Any:
        raise RuntimeError("refused sk-stored")
        yield ""

    with fake_model(answer):
        result = run_enrich(file, "--column", "answer", "--key", "mine", "--max-failures", "1")
    assert "--key mine" in result.stdout
    assert "sk-stored" not in result.output + str(file.run("select error from _llm_enrich_errors"))


def test_models_and_purposes(tmp_path: Path) -> None:
    class Plugin:
        __name__ = "purposes"

        @staticmethod
        def register_llm_purposes() -> list[Purpose]:
            return [Purpose("sorting", "Sort things")]

    HookimplMarker("datasette")(Plugin.register_llm_purposes)
    config = tmp_path / "datasette.yaml"
    config.write_text(
        "plugins: {datasette-llm: {models: [fake, second], purposes: {sorting: {model: second}}}}"
    )
    plugin_manager().register(Plugin())
    with fake_model():
        models = run("models", "--purpose", "sorting", "--config", str(config))
        as_json = run("models", "--json", "--config", str(config))
        purposes = run("purposes", "--config", str(config))
        purposes_json = run("purposes", "--json")
    assert models.stdout == "second  (default)\nfake\n"
    assert [(model["model_id"], model["shared_clients"]) for model in json.loads(as_json.stdout)] == [
        ("fake", False),
        ("second", False),
    ]
    assert purposes.stdout.splitlines()[0] == "sorting  (second)  Sort things"
    assert purposes.stdout.splitlines()[1].startswith("enrichments  (no default model)  ")
    sorting, ours = json.loads(purposes_json.stdout)
    assert sorting == {"name": "sorting", "description": "Sort things", "model": None}
    assert ours["name"] == "enrichments"


def test_no_models_say_so(tmp_path: Path) -> None:
    config = tmp_path / "datasette.yaml"
    config.write_text("plugins: {datasette-llm: {models: []}}")
    assert "No model can be used" in run("models", "--config", str(config)).stderr


@pytest.mark.parametrize("with_airports", [True, False])
def test_demo_enriches_its_table_and_then_has_nothing_left(
    with_airports: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_airports:
        monkeypatch.setattr(demo, "_airports_csv", lambda: None)
    path = str(tmp_path / "demo.db")

    class Policy:
        __name__ = "policy"

        @staticmethod
        def llm_filter_models() -> list[Any]:
            return []

    HookimplMarker("datasette")(Policy.llm_filter_models)
    plugin_manager().register(Policy(), name="strict-policy")
    first = run("demo", path)
    assert first.exit_code == 0, first.output
    assert re.search(r"[23],\d{3} rows of \w+ \(summary\) written with echo", first.stdout)
    assert "Left out, since this model has no price and no key: strict-policy" in first.stdout
    assert ("Thigpen" in first.stdout) == with_airports
    assert f"datasette {path}" in first.stdout
    assert plugin_manager().has_plugin("strict-policy")
    second = run("demo", path)
    assert second.exit_code == 0
    assert "Nothing left to do" in second.stdout


def test_demo_keeps_its_hands_off_other_files(file: TableFile, tmp_path: Path) -> None:
    assert "give the demo a path of its own" in run("demo", file.path).stderr
    other = tmp_path / "notes.txt"
    other.write_text("not a database, but long enough to be looked at" * 10)
    result = run("demo", str(other))
    assert (result.exit_code, "cannot be used for the demo" in result.stderr) == (2, True)


def test_demo_without_its_model_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install llm-echo" in run("demo", str(tmp_path / "demo.db")).stderr


# Signals: the command runs as a process of its own, and other programs look at the database.


class SlowRun:
    """One run of ``datasette llm enrich`` over 200 rows with the model ``slow``."""

    def __init__(self, directory: Path, backend: str, seconds: float, *more: str) -> None:
        self.log = directory / "prompts.log"
        self.file = directory / "data.db"
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.slow_cli", "llm", "enrich", str(self.file), "t", "{{ body }}",
                "--column", "answer", "--model", "slow", "--concurrency", "5", "--backend", backend, *more,
            ],
            cwd=ROOT,
            env=os.environ | {"PROMPT_LOG": str(self.log), "SLOW_SECONDS": str(seconds)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def wait_until_asked(self, prompts: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.log.exists() or len(self.log.read_text().splitlines()) < prompts:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, out, err


@pytest.fixture
def slow_file(tmp_path: Path) -> TableFile:
    file = TableFile(tmp_path, "create table t (id integer primary key, body, answer)")
    file.run_many("insert into t(body) values (?)", [(f"row {n}",) for n in range(1, 201)])
    return file


def check_complete(file: TableFile, log: Path, most_twice: int) -> None:
    assert file.run("select count(*) from t where answer = upper(body)") == [(200,)]
    asked = log.read_text().splitlines()
    assert set(asked) == {f"row {n}" for n in range(1, 201)}
    assert len(asked) - 200 <= most_twice


@pytest.mark.system
@pytest.mark.parametrize(
    ("backend", "number", "code"), [("asyncio", signal.SIGINT, 130), ("trio", signal.SIGTERM, 143)]
)
def test_a_signal_writes_what_is_answered_and_says_how_to_go_on(
    backend: str, number: int, code: int, slow_file: TableFile, tmp_path: Path
) -> None:
    stopped = SlowRun(tmp_path, backend, 0.1)
    stopped.wait_until_asked(12)
    stopped.process.send_signal(number)
    returncode, out, err = stopped.end()

    assert returncode == code
    assert "prompts in flight" in err
    asked = len(stopped.log.read_text().splitlines())
    assert slow_file.run("select count(answer) from t") == [(asked,)]
    assert f"{200 - asked:,} rows left" in out
    command = shlex.split(out.split("Go on with:\n")[1].splitlines()[0])
    assert command[:6] == ["datasette", "llm", "enrich", str(tmp_path / "data.db"), "t", "{{ body }}"]
    assert command[6:10] == ["--column", "answer", "--model", "slow"]

    assert SlowRun(tmp_path, backend, 0.0).end()[0] == 0
    check_complete(slow_file, stopped.log, most_twice=0)


@pytest.mark.system
def test_a_second_ctrl_c_ends_the_process_at_once(slow_file: TableFile, tmp_path: Path) -> None:
    stopped = SlowRun(tmp_path, "asyncio", 600)
    stopped.wait_until_asked(5)
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.process.stderr is not None
    assert "Stopping" in stopped.process.stderr.readline()
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.end()[0] == 130


@pytest.mark.system
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_killed_at_any_moment_it_goes_on_and_pays_for_half_a_second_at_most(
    backend: str, slow_file: TableFile, tmp_path: Path
) -> None:
    kills = 2
    chance = random.Random(backend)
    for kill in range(1, kills + 1):
        killed = SlowRun(tmp_path, backend, 0.05)
        killed.wait_until_asked(chance.randint(30, 50) * kill)
        killed.process.kill()
        killed.end()
    assert SlowRun(tmp_path, backend, 0.0).end()[0] == 0
    # Five in flight, and at five answers per 0.05 s what half a second brings before it is written.
    check_complete(slow_file, killed.log, most_twice=kills * (5 + 50))
