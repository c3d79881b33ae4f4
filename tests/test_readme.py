"""README.md and docs/ are true: their programs, commands and configurations are run as they are printed."""

from __future__ import annotations

import contextlib
import gc
import io
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import pytest
import yaml
from click.testing import CliRunner
from datasette.app import Datasette
from datasette.cli import cli

import datasette_llm
from datasette_llm import hookspecs
from datasette_llm.access.sections import PLUGIN_NAME, PluginSettings, PurposeSettings
from datasette_llm.access.settings import parse_settings
from datasette_llm.cli import llm_group
from datasette_llm.pace.policy import PromptSettings

from .enrich_tables import close_datasette
from .patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
#: The text of each page, by its path from the root.
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}

#: How long it takes differs from run to run, and older versions of llm-echo count no tokens.
FIGURES = re.compile(r"[\d,]+ tokens in, [\d,]+ out, no price known, [\d.,]+ s, [\d.,]+ rows/s")
SET_UP = [
    "pip install -q uv && uv run datasette llm demo",
    "pip install -q uv && uv run --isolated --group plugins pytest -n auto",
]


class Block(NamedTuple):
    """A fenced block of a page, and the ``text`` block right under it."""

    page: str
    line: int
    language: str
    code: str
    output: str | None


def _blocks(page: str) -> Iterator[Block]:
    text = PAGES[page]
    # In a list the block is indented.
    fence = re.compile(r"^( *)```(\w+)\n(.*?)^ *```\n(?:```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
    for match in fence.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match[2], textwrap.dedent(match[3]), match[4])


BLOCKS = [block for page in PAGES for block in _blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
#: What changes the whole process is run in one of its own.
SET_UPS = [block for block in PYTHON if "set_tracer_provider" in block.code]
PROGRAMS = [block for block in PYTHON if block not in SET_UPS]
CONFIGURATIONS = [block for block in BLOCKS if block.language == "yaml"]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]


def _id(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; the Datasettes made in it are closed afterwards."""
    monkeypatch.chdir(tmp_path)
    before = {id(found) for found in gc.get_objects() if isinstance(found, Datasette)}
    yield tmp_path
    for found in gc.get_objects():
        if isinstance(found, Datasette) and id(found) not in before:
            close_datasette(found)


@pytest.mark.parametrize("block", PROGRAMS, ids=_id)
def test_a_program_prints_what_is_under_it(block: Block, directory: Path) -> None:
    if "add_background_task" in block.code and not hasattr(Datasette, "add_background_task"):
        pytest.skip("this Datasette has no background tasks")
    assert block.output is not None, "every program is followed by its output"
    assert _run(block, block.code) == block.output.strip()


@pytest.mark.parametrize(
    "block",
    [block for block in PROGRAMS if "anyio.run(main)" in block.code and "await datasette." not in block.code],
    ids=_id,
)
def test_a_program_that_only_prompts_runs_under_trio_as_it_is(block: Block, directory: Path) -> None:
    assert block.output is not None
    on_trio = block.code.replace("anyio.run(main)", 'anyio.run(main, backend="trio")')
    assert _run(block, on_trio) == block.output.strip()


def _run(block: Block, code: str) -> str:
    printed = io.StringIO()
    program = compile(code, _id(block), "exec")
    with contextlib.redirect_stdout(printed):
        exec(program, {"__name__": "__main__"})
    return printed.getvalue().strip()


#: A prompt in a Datasette that has loaded the plugin before.
PROMPT = """
import asyncio
from datasette.app import Datasette
from opentelemetry import metrics
from datasette_llm import LLM

async def main():
    datasette = Datasette(memory=True, plugins_dir="plugins")
    await datasette.invoke_startup()
    model = await LLM(datasette).model("echo", purpose="testing")
    await (await model.prompt("a secret question")).text()
    # As the reader does every minute; lanes are those of event loops that run.
    metrics.get_meter_provider().force_flush()

asyncio.run(main())
"""


@pytest.mark.system
@pytest.mark.parametrize("block", SET_UPS, ids=_id)
def test_a_set_up_for_telemetry_collects_spans_and_metrics(block: Block, directory: Path) -> None:
    (directory / "plugins").mkdir()
    (directory / "plugins" / "telemetry.py").write_text(block.code)
    printed = subprocess.run(
        [sys.executable, "-c", PROMPT], capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    ).stdout
    for told in ('"chat echo"', "gen_ai.client.operation.duration", "datasette_llm.lane.limit"):
        assert told in printed
    assert "secret question" not in printed


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=_id)
def test_a_configuration_is_valid(block: Block) -> None:
    parse_settings(yaml.safe_load(block.code)["plugins"][PLUGIN_NAME])


def _arguments(block: Block) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in block.code.splitlines()]
    return [line[1:] for line in lines if line[:2] == ["datasette", "llm"]]


@pytest.mark.parametrize(
    "page", sorted({block.page for block in COMMANDS if block.output is not None and _arguments(block)})
)
def test_commands_print_what_is_under_them(page: str, directory: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(cli, ["llm", "demo"]).exit_code == 0
    for block in COMMANDS:
        if block.page == page and block.output is not None:
            (arguments,) = _arguments(block)
            result = runner.invoke(cli, arguments)
            assert (result.exit_code, result.stderr) == (0, "")
            assert FIGURES.sub("", result.stdout).strip() == FIGURES.sub("", block.output).strip()


def test_the_other_commands_have_options_that_exist(directory: Path) -> None:
    for block in COMMANDS:
        for named in re.findall(r"\b\w+\.(?:db|yaml)\b", block.code):
            (directory / named).touch()
    parsed = 0
    for block in COMMANDS:
        for _, name, *arguments in _arguments(block):
            command = llm_group.commands[name]
            assert isinstance(command, click.Command)
            with contextlib.suppress(click.exceptions.Exit):  # --help
                command.make_context(name, list(arguments), resilient_parsing="demo.db" in arguments)
            parsed += 1
    assert parsed


def test_the_two_commands_that_do_all_set_up_come_first() -> None:
    assert [block.code.strip() for block in COMMANDS[:2]] == SET_UP


def test_the_readme_stays_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 270, "what is reference belongs to docs/"


def _headings(page: str) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "hook", [name for name, value in vars(hookspecs).items() if hasattr(value, "datasette_spec")]
)
def test_a_hook_has_a_heading_with_its_arguments(hook: str) -> None:
    specification = getattr(hookspecs, hook)
    names = specification.__code__.co_varnames[: specification.__code__.co_argcount]
    assert f"`{hook}({', '.join(names)})`" in _headings("docs/hooks.md")


@pytest.mark.parametrize("key", sorted({*PluginSettings.model_fields, *PurposeSettings.model_fields}))
def test_a_configuration_key_is_explained_and_shown(key: str) -> None:
    assert re.search(rf"^\| .*\b{key}\b.* \|", PAGES["docs/configuration.md"], re.MULTILINE)
    assert any(re.search(rf"^ *{key}:", block.code, re.MULTILINE) for block in CONFIGURATIONS)


def test_the_defaults_in_the_table_are_the_defaults() -> None:
    usual = PromptSettings()
    bounds = usual.concurrency
    assert not isinstance(bounds, int)
    for default in (
        f"{bounds.start}, {bounds.min}, {bounds.max}",
        f"{usual.retries.attempts}",
        f"{usual.retries.timeout:g}",
    ):
        assert f" | {default} |\n" in PAGES["docs/configuration.md"]


@pytest.mark.parametrize("name", datasette_llm.__all__)
def test_a_public_name_is_mentioned(name: str) -> None:
    assert any(re.search(rf"\b{name}\b", text) for text in PAGES.values())


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)", PAGES["README.md"]))
    assert linked == {page for page in PAGES if page != "README.md"}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path.relative_to(ROOT).as_posix()), target


def _anchors(page: str) -> set[str]:
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in _headings(page)}
