"""llm's templates and fragments on the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import sqlite_utils
from click.testing import CliRunner
from datasette.cli import cli
from jinja2 import Environment
from llm.migrations import migrate

from datasette_llm.cli.options import InputProblem
from datasette_llm.cli.templates import Said, literal, with_templates

from .enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path, llm_home: Path) -> TableFile:
    file = TableFile(tmp_path, "create table t (id integer primary key, body text, mood text)")
    file.run("insert into t (id, body) values (1, 'sunny {{ day }}')")
    return file


def template(home: Path, name: str, **parts: Any) -> None:
    (home / "templates" / f"{name}.yaml").write_text(json.dumps(parts))


def said(prompt: str | None = None, *names: str, **parameters: str) -> Said:
    return with_templates(
        Said(prompt=prompt), names, parameters=parameters, columns=lambda: ["id", "body", "not"]
    )


@pytest.mark.parametrize(
    "text", ["{", "{{ x }} {% raw %} {# c #}", 'json {"a": {"b": 1}}', "{{{", "ends with {", "a\nb\n"]
)
def test_a_text_of_others_is_sent_as_it_is(text: str) -> None:
    rendered = Environment(keep_trailing_newline=True).from_string(literal(text) + "{{ 1 }}")
    assert rendered.render() == f"{text}1"


def test_variables_of_a_template_are_columns(llm_home: Path) -> None:
    template(
        llm_home, "judge", prompt="Judge $body for $$5 ({$body}, ${not}): $tone", defaults={"tone": "kind"}
    )
    rendered = Environment().from_string(said(None, "judge").prompt or "")
    row = {"body": "B", "not": "N"}
    assert rendered.render(**row, row=row) == "Judge B for $5 ({B}, N): kind"
    rendered = Environment().from_string(said(None, "judge", tone="{{ x }}").prompt or "")
    assert rendered.render(**row, row=row).endswith("{{ x }}")


def test_the_prompt_is_a_templates_input_or_comes_after_it(llm_home: Path) -> None:
    template(llm_home, "wrap", prompt="<<$input>>")
    template(llm_home, "first", prompt="First")
    template(llm_home, "only_system", system="Be brief")
    assert said("{{ body }}", "wrap").prompt == "<<{{ body }}>>"
    assert said("{{ body }}", "first").prompt == "First\n{{ body }}"
    assert said("{{ body }}", "first", "wrap").prompt == "<<First\n{{ body }}>>"
    assert said("{{ body }}", "only_system") == Said(prompt="{{ body }}", system="Be brief")


def test_what_the_command_says_goes_before_what_the_template_says(llm_home: Path) -> None:
    template(
        llm_home,
        "all",
        prompt="P",
        system="S",
        model="M",
        options={"temperature": 0.5, "seed": 1},
        schema_object={"type": "object"},
        extract_last=True,
    )
    of_template = said(None, "all")
    assert (of_template.system, of_template.model, of_template.extract) == ("S", "M", "last")
    assert of_template.options == {"temperature": 0.5, "seed": 1}
    assert of_template.schema == '{"type": "object"}'
    given = Said(system="s", model="m", options={"temperature": "1"}, schema="x", extract="first")
    both = with_templates(given, ["all"], parameters={}, columns=list)
    assert both == Said("P", "s", "m", {"temperature": "1", "seed": 1}, "x", "first")


def test_what_no_row_has_a_use_for_is_refused(llm_home: Path) -> None:
    template(llm_home, "tools", prompt="P", tools=["llm_time"])
    template(llm_home, "types", prompt="P", attachment_types=[{"type": "image/png", "value": "x"}])
    template(llm_home, "system", prompt="P", system="In $language")
    for name, problem in [
        ("tools", "has tools"),
        ("types", "of what types"),
        ("system", "-p language VALUE"),
    ]:
        with pytest.raises(InputProblem, match=problem):
            said(None, name)
    with pytest.raises(InputProblem, match="cannot be used"):
        said(None, "missing")
    assert said(None, "system", language="Dutch").system == "In Dutch"


def test_fragments_come_before_the_prompt(llm_home: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.txt").write_text("Rules {{ here }}")
    db = sqlite_utils.Database(llm_home / "logs.db")
    migrate(db)
    with db.conn:
        db.conn.execute("insert into fragments (id, hash, content) values (1, 'abc', 'Known')")
        db.conn.execute("insert into fragment_aliases (alias, fragment_id) values ('known', 1)")
    db.close()
    template(llm_home, "f", prompt="P", fragments=["known"], system_fragments=["known"], system="S")
    done = with_templates(Said(), ["f"], fragments=[str(tmp_path / "rules.txt")], parameters={}, columns=list)
    assert Environment().from_string(done.prompt or "").render() == "Known\nRules {{ here }}\nP"
    assert done.system == "Known\n\nS"
    with pytest.raises(InputProblem, match="fragment 'nowhere'"):
        with_templates(Said(), [], fragments=["nowhere"], parameters={}, columns=list)


def test_the_command_needs_no_prompt_beside_a_template(file: TableFile, llm_home: Path) -> None:
    template(llm_home, "judge", prompt="Judge: $body", model="fake", extract=True, options={"temperature": 0})

    async def answer(prompt: str) -> Any:
        yield "Here:\n```python\n    code\n```\nand\n```\nmore\n```\n"

    with fake_model(answer) as model:
        done = CliRunner().invoke(
            cli, ["llm", "enrich", file.path, "t", "-t", "judge", "--column", "mood", "--where", "1"]
        )
    assert done.exit_code == 0, done.output
    assert model.prompts == ["Judge: sunny {{ day }}"]
    assert file.run("select mood from t") == [("    code",)]
    [spec] = file.run("select spec from _llm_runs")
    assert json.loads(spec[0])["extract"] is True


def test_something_has_to_be_asked(file: TableFile, llm_home: Path) -> None:
    template(llm_home, "brief", system="Be brief")
    done = CliRunner().invoke(cli, ["llm", "enrich", file.path, "t", "-t", "brief", "--column", "mood"])
    assert done.exit_code == 2
    assert "Say what to ask" in done.output


def test_the_model_is_found_by_a_part_of_its_id(file: TableFile) -> None:
    with fake_model() as model:
        done = CliRunner().invoke(
            cli, ["llm", "enrich", file.path, "t", "{{ body }}", "--column", "mood", "-q", "fak"]
        )
        assert done.exit_code == 0, done.output
        done = CliRunner().invoke(
            cli, ["llm", "enrich", file.path, "t", "x", "--column", "mood", "-q", "zz9"]
        )
    assert model.prompts == ["sunny {{ day }}"]
    assert (done.exit_code, "'zz9'" in done.output) == (2, True)


def test_help_is_in_sections_after_three_examples() -> None:
    shown = CliRunner().invoke(cli, ["llm", "enrich", "--help"], terminal_width=80).output
    places = [shown.index(f"\n{name}:") for name in ("What", "How", "Limits", "Output")]
    assert places == sorted(places)
    assert shown[: places[0]].count("  datasette llm enrich data.db") == 3
    assert "\nOther:\n  --help" in shown
    assert max(map(len, shown.splitlines())) <= 80
