"""What `datasette_llm` offers, and that the rest of the world may rely on it."""

from __future__ import annotations

import ast
import importlib
import inspect
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType

import llm
import pytest

import datasette_llm

#: The names that existing plugins import, and those that are new in 0.2.
KEPT = {
    "LLM",
    "Group",
    "ModelNotFoundError",
    "PromptResult",
    "Purpose",
    "WrappedAsyncModel",
    "WrappedConversation",
    "get_purposes",
}
NEW = {"GroupClosed", "GroupModel", "PromptCancelled", "PromptResponse", "enrich"}

PACKAGE = Path(datasette_llm.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_the_public_names_are_these() -> None:
    assert set(datasette_llm.__all__) == KEPT | NEW
    assert len(datasette_llm.__all__) == len(KEPT | NEW)


def test_nothing_else_looks_public() -> None:
    needed = {"annotations", "import_module", "ModuleType", "TYPE_CHECKING", "Any"}
    visible = {
        name
        for name in dir(datasette_llm)
        if not name.startswith("_") and not isinstance(getattr(datasette_llm, name), ModuleType)
    }
    assert visible - needed == set(datasette_llm.__all__)


@pytest.mark.parametrize("name", datasette_llm.__all__)
def test_a_public_name_is_documented_down_to_its_methods(name: str) -> None:
    value = getattr(datasette_llm, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for method_name, method in inspect.getmembers(value, inspect.isfunction):
            # What llm's response has by itself, llm documents.
            ours = method.__module__.startswith("datasette_llm") and not hasattr(
                llm.AsyncResponse, method_name
            )
            if ours and not method_name.startswith("_"):
                assert inspect.getdoc(method), method_name


@pytest.mark.parametrize("name", datasette_llm.__all__)
def test_a_public_signature_is_annotated(name: str) -> None:
    value = getattr(datasette_llm, name)
    functions = [value] if inspect.isfunction(value) else []
    if inspect.isclass(value):
        functions = [
            method
            for method_name, method in vars(value).items()
            if inspect.isfunction(method) and not method_name.startswith("_")
        ]
    for function in functions:
        assert "return" in function.__annotations__, function.__qualname__
        parameters = [
            parameter for parameter in inspect.signature(function).parameters if parameter != "self"
        ]
        assert set(parameters) <= set(function.__annotations__), function.__qualname__


def test_errors_are_caught_as_what_they_are() -> None:
    assert issubclass(datasette_llm.ModelNotFoundError, llm.UnknownModelError)
    assert issubclass(datasette_llm.PromptCancelled, Exception)
    assert issubclass(datasette_llm.GroupClosed, RuntimeError)
    assert issubclass(datasette_llm.PromptResponse, llm.AsyncResponse)
    assert issubclass(datasette_llm.GroupModel, datasette_llm.WrappedAsyncModel)


def test_enrich_stays_a_function_beside_its_package() -> None:
    importlib.import_module("datasette_llm.enrich")
    assert inspect.iscoroutinefunction(datasette_llm.enrich)
    from datasette_llm import enrich

    assert enrich is datasette_llm.enrich


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files(datasette_llm).joinpath("py.typed").is_file()


def test_datasette_finds_the_plugin() -> None:
    values = [entry_point.value for entry_point in metadata.entry_points(group="datasette")]
    assert values.count("datasette_llm.plugin") == 1


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_says_what_it_is_about(path: Path) -> None:
    # Read and not imported: some need packages that are optional.
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
