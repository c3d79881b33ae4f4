"""What Datasette itself calls, and the purposes other plugins register."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from datasette.plugins import pm
from datasette.utils import StartupError

from datasette_llm import Purpose, get_purposes
from datasette_llm.access import starting
from datasette_llm.access.purposes import ENRICHMENTS, listed_purposes
from datasette_llm.backends import datasette_side
from datasette_llm.hookspecs import plugin_manager

from .fakes import FakeModel, registered
from .hooks import datasette_with, hooked

if TYPE_CHECKING:
    from pathlib import Path

HOOKS = {
    "llm_prompt_context": ["datasette", "model_id", "prompt", "purpose", "actor"],
    "llm_group_exit": ["datasette", "group"],
    "register_llm_purposes": ["datasette"],
    "llm_filter_models": ["datasette", "models", "actor", "purpose"],
    "llm_default_model": ["datasette", "purpose", "actor"],
}


def test_the_hooks_and_their_arguments() -> None:
    for name, arguments in HOOKS.items():
        spec = getattr(plugin_manager().hook, name).spec
        assert list(spec.argnames) == arguments
        assert spec.function.__doc__


async def start(config: Any) -> None:
    await datasette_side.call(datasette_with(config).invoke_startup)


@pytest.mark.real_clock
@pytest.mark.parametrize("config", [None, {}, {"purposes": None}, {"default_model": "fake"}])
async def test_startup_with_nothing_to_say(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    with registered(FakeModel()):
        await start(config)
    assert [record for record in caplog.records if record.name == "datasette_llm"] == []


@pytest.mark.real_clock
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"purposes": {"extract": {"modle": "m"}}},
            "plugins.datasette-llm.purposes.extract.modle: unknown key",
        ),
        (
            {"default_model": {"model": "fake", "options": {"temprature": 1}}},
            "plugins.datasette-llm.default_model.options.temprature: fake has no such option; it has temp",
        ),
        (
            {"purposes": {"p": {"models": [{"model": "fake", "options": {"temperature": "hot"}}]}}},
            "plugins.datasette-llm.purposes.p.models.0.options.temperature: ",
        ),
    ],
)
async def test_startup_stops_on_a_mistake(config: Any, message: str) -> None:
    with registered(FakeModel()), pytest.raises(StartupError) as caught:
        await start(config)
    assert str(caught.value).startswith(message)


@pytest.mark.real_clock
@pytest.mark.parametrize(
    ("config", "warnings"),
    [
        ({"default_model": "fakee"}, ["default_model: unknown model 'fakee'; did you mean fake?"]),
        (
            {"models": ["fake", "nope1"], "blocked_models": ["nope2"], "rate_limits": {"nope3": None}},
            ["models.1: unknown", "blocked_models.0: unknown", "rate_limits.nope3: unknown"],
        ),
        (
            {"purposes": {"p": {"model": "nope1", "models": ["nope2"], "blocked_models": ["nope3"]}}},
            ["purposes.p.model: unk", "purposes.p.models.0: unk", "purposes.p.blocked_models.0: unk"],
        ),
        ({"default_model": "fake", "blocked_models": ["fake"]}, ["default_model: 'fake' is blocked"]),
        (
            {"purposes": {"p": {"model": "fake", "blocked_models": ["fake"]}}},
            ["purposes.p.model: 'fake' is blocked"],
        ),
        (
            {"default_model": "fake", "purposes": {"p": {"models": ["gpt-4o"]}, "q": None}},
            ["purposes.p: default_model 'fake' is blocked or not in the list"],
        ),
        (
            {"models": ["gpt-3.5-turbo-instruct"]},
            ["models.0: unknown model 'gpt-3.5-turbo-instruct' is installed without an async version"],
        ),
    ],
)
async def test_what_has_no_effect_is_warned_of_when_a_server_is_up(
    config: Any, warnings: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "QUIET_SECONDS", 0)
    with registered(FakeModel()):
        await starting.prepare(datasette_with(config))
    said = [
        r.getMessage() for r in caplog.records if r.name == "datasette_llm" and r.levelno == logging.WARNING
    ]
    assert len(said) == len(warnings)
    for message, expected in zip(said, warnings, strict=True):
        assert message.startswith(f"plugins.datasette-llm.{expected}")


@pytest.mark.real_clock
@pytest.mark.skipif(not hasattr(pm.hook, "shutdown"), reason="this Datasette has no shutdown hook")
async def test_shutdown_drains() -> None:
    (drained,) = pm.hook.shutdown(datasette=datasette_with())
    await drained


def test_commands_are_registered() -> None:
    from datasette.cli import cli

    assert "llm" in cli.commands


# Purposes.


def test_without_other_plugins_there_are_no_purposes() -> None:
    assert get_purposes(datasette_with()) == []


def test_our_own_is_registered_where_its_page_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/plugins` has the real datasette-enrichments."""
    module = type(sys)("datasette_enrichments")
    monkeypatch.setitem(sys.modules, "datasette_enrichments", module)
    datasette = datasette_with()
    assert get_purposes(datasette) == []
    plugin_manager().register(module)
    assert get_purposes(datasette) == [ENRICHMENTS]


def test_others_may_describe_our_purpose() -> None:
    assert listed_purposes(datasette_with()) == [ENRICHMENTS]
    with hooked(register_llm_purposes=lambda: [Purpose("enrichments", "theirs")]):
        assert listed_purposes(datasette_with()) == [Purpose("enrichments", "theirs")]


def test_purposes_are_listed_and_the_first_registration_wins() -> None:
    # pluggy asks the plugin that was registered last first.
    with (
        hooked(register_llm_purposes=lambda datasette: [Purpose("a", "second"), Purpose("c", "C")]),
        hooked(register_llm_purposes=lambda: (Purpose(name="a", description="first"), Purpose("b", "B"))),
        hooked(register_llm_purposes=lambda: None),
    ):
        found = get_purposes(datasette_with())
    assert [(purpose.name, purpose.description) for purpose in found] == [
        ("a", "first"),
        ("b", "B"),
        ("c", "C"),
    ]


async def _coroutine() -> list[Purpose]:
    return []


@pytest.mark.parametrize("junk", [5, "a", ["a"], [None], pytest.param(_coroutine, id="coroutine")], ids=str)
def test_junk_among_purposes_is_left_out_with_a_warning(junk: Any, caplog: pytest.LogCaptureFixture) -> None:
    with (
        hooked(register_llm_purposes=lambda: junk() if callable(junk) else junk),
        hooked(register_llm_purposes=lambda: Purpose("alone")),
    ):
        assert get_purposes(datasette_with()) == [Purpose("alone")]
    assert "register_llm_purposes: left out" in caplog.text


def test_plugins_that_import_from_this_package_when_loaded(tmp_path: Path) -> None:
    """`import datasette_llm` may be what first makes Datasette load all plugins, ours among them."""
    (tmp_path / "eager_plugin.py").write_text(
        "from datasette import hookimpl\n"
        "from datasette_llm import LLM, Purpose\n"
        "@hookimpl\n"
        "def register_llm_purposes(datasette):\n"
        "    return [Purpose('eager', '')]\n"
    )
    info = tmp_path / "eager_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eager-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[datasette]\neager = eager_plugin\n")
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "DATASETTE_LOAD_PLUGINS": "eager-plugin,datasette-llm,datasette-secrets",
    }
    for first in ("datasette_llm", "datasette.app", "eager_plugin"):
        script = (
            f"import {first}\n"
            "from datasette_llm import get_purposes\n"
            "from datasette.app import Datasette\n"
            "print([purpose.name for purpose in get_purposes(Datasette())])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False
        )
        assert done.stdout == "['eager']\n", (first, done.stderr)
