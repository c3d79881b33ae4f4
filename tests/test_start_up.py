"""A Datasette that starts with this plugin does not wait for what only prompts need."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from datasette.app import Datasette

from datasette_llm.calls import loading

#: What takes time to import, and is for prompts only. (Datasette itself has pydantic and httpx.)
FOR_PROMPTS = {
    "anyio",
    "datasette_llm.access.catalog",
    "datasette_llm.enrich",
    "datasette_llm.facade",
    "datasette_llm.models",
    "genai_prices",
    "jinja2.sandbox",
    "llm",
    "openai",
    "sqlite_utils",
    "stamina",
    "tqdm",
}


def imported_by(program: str) -> set[str]:
    """Return the modules that a program has imported at its end, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_CORE")}
    done = subprocess.run(
        [sys.executable, "-c", program + "\nprint(*__import__('sys').modules)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


STARTED = """
import asyncio
from datasette.app import Datasette

async def start():
    await Datasette(memory=True, config=CONFIG).invoke_startup()

asyncio.run(start())
"""
CONFIG = {"default_model": "gpt-4o-mini", "purposes": {"enrichments": {"model": "gpt-4o"}}}


@pytest.fixture(scope="module")
def of_datasette() -> set[str]:
    """What a Datasette without plugins imports."""
    program = "import os; os.environ['DATASETTE_LOAD_PLUGINS'] = ''\nCONFIG = {}" + STARTED
    return imported_by(program)


@pytest.mark.parametrize(
    "program",
    [
        "import datasette_llm.plugin",
        "import datasette.cli",
        "CONFIG = {}" + STARTED,
        # However slow the machine: what is loaded once a server has been quiet is not part of its start.
        pytest.param(
            "import datasette_llm.access.starting as s; s.QUIET_SECONDS = 3600\n"
            f"CONFIG = {{'plugins': {{'datasette-llm': {CONFIG!r}}}}}" + STARTED,
            marks=pytest.mark.skipif(
                not hasattr(Datasette, "add_background_task"), reason="nothing but the start could warn here"
            ),
        ),
    ],
    ids=["import", "command", "start", "configured start"],
)
def test_nothing_that_only_prompts_need_is_imported(program: str, of_datasette: set[str]) -> None:
    imported = imported_by(program)
    assert "datasette_llm.plugin" in imported
    assert imported & (FOR_PROMPTS - of_datasette) == set()


def test_enrich_is_the_function_whoever_imports_the_room_first() -> None:
    for first in ("import datasette_llm.enrich.spec", "import datasette_llm.enrich", "pass"):
        program = f"{first}\nfrom datasette_llm import enrich\nassert enrich.__name__ == 'enrich', enrich"
        assert "datasette_llm.enrich.job" in imported_by(program)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    import datasette_llm

    with pytest.raises(AttributeError, match="has no attribute 'LLMs'"):
        _ = datasette_llm.LLMs  # type: ignore[attr-defined]
    assert set(datasette_llm.__all__) <= set(dir(datasette_llm))


@pytest.mark.real_clock
async def test_modules_of_llm_plugins_are_imported_in_a_thread_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(loading, "_import_model_plugins", lambda: calls.append("imported"))
    await loading.import_model_plugins()
    assert calls == []  # these tests have imported them
    monkeypatch.delitem(sys.modules, loading._FIRST_PLUGIN)
    await loading.import_model_plugins()
    assert calls == ["imported"]


def test_a_broken_llm_plugin_is_left_to_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class EntryPoint:
        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> None:
            loaded.append(self.name)
            if self.name == "broken":
                raise ImportError("not today")

    found = [EntryPoint("broken"), EntryPoint("fine")]
    monkeypatch.setattr(loading, "entry_points", lambda group: found)
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")  # llm is told to load nothing that is installed
    loading._import_model_plugins()
    assert loaded == []
    monkeypatch.delenv("LLM_LOAD_PLUGINS")
    loading._import_model_plugins()
    assert loaded == ["broken", "fine"]


@pytest.mark.skipif(not hasattr(Datasette, "add_background_task"), reason="this Datasette has none")
@pytest.mark.parametrize("config", [{}, {"plugins": {"datasette-llm": {}}}])
async def test_a_server_prepares_for_prompts_if_it_is_configured_for_any(config: dict[str, Any]) -> None:
    from datasette_llm import plugin

    datasette = Datasette(memory=True, config=config)
    plugin.startup(datasette)
    tasks = [task.name for task in datasette._background_tasks.tasks()]
    prepares = ["datasette-llm: prepare for prompts"] if config else []
    assert tasks == ["datasette-llm: collect batches", *prepares]
