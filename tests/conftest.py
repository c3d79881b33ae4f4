"""Both backends, with a virtual clock unless a test asks for the real one."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib.metadata
import os
import selectors
import warnings
from typing import TYPE_CHECKING, Any

import certifi
import llm.plugins
import pytest
import trio.testing
from llm.default_plugins import openai_models

# Other plugins that are installed have a say in every prompt: a test registers those it is about.
os.environ["DATASETTE_LOAD_PLUGINS"] = "datasette-llm,datasette-secrets"
# Those of providers look for models in files and on the network whenever llm lists its models: a test makes
# the models that it is about. llm reads the variable when it is imported; processes that tests start do so.
os.environ["LLM_LOAD_PLUGINS"] = llm.plugins.LLM_LOAD_PLUGINS = "llm-echo"

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from pathlib import Path


class AutojumpSelector(selectors.DefaultSelector):
    """A selector that never waits: when nothing is ready, time jumps to the next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(None if timeout is None else 0)
        if not ready and timeout:
            self.now += timeout
        return ready


class AutojumpLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop on virtual time.

    Like trio's autojump clock it cannot see threads: a test that touches Datasette's database
    keeps the real clock, with ``@pytest.mark.real_clock``.
    """

    def __init__(self) -> None:
        self._virtual_selector = AutojumpSelector()
        super().__init__(self._virtual_selector)

    def time(self) -> float:
        return self._virtual_selector.now


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, Mapping[str, Any]]:
    """The backend of a test; ``@pytest.mark.real_clock`` keeps the machine's clock."""
    virtual = request.node.get_closest_marker("real_clock") is None
    if request.param == "trio":
        if virtual:
            # Trio shuffles the tasks that may run; on virtual time a test is to go the same way each time.
            trio._core._run._r.seed(0)
        return "trio", ({"clock": trio.testing.MockClock(autojump_threshold=0)} if virtual else {})
    return "asyncio", ({"loop_factory": AutojumpLoop} if virtual else {})


RANDOM_CANCELLATIONS = 150


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-cancellations",
        type=int,
        metavar="N",
        help=f"test N random plans per backend, new ones each time, not the same {RANDOM_CANCELLATIONS}",
    )


def pytest_configure(config: pytest.Config) -> None:
    import hypothesis
    from datasette import handle_exception

    chosen = config.getoption("--random-cancellations")
    hypothesis.settings.register_profile(
        "random cancellations",
        max_examples=chosen or RANDOM_CANCELLATIONS,
        derandomize=chosen is None,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    # import-linter brings rich along, with which Datasette fails on a page that there is not.
    handle_exception.rich = None
    if not hasattr(openai_models.build_options_class, "cache_info"):
        # llm before 0.35 makes a hundred classes of options each time it lists its models, a tenth of
        # a second that nearly every test would wait for.
        openai_models.build_options_class = functools.cache(openai_models.build_options_class)
    # Each Datasette asks for the versions of its plugins, and reads their metadata for that.
    read = importlib.metadata.Distribution.metadata.fget  # type: ignore[attr-defined]
    importlib.metadata.Distribution.metadata = property(functools.cache(read))  # type: ignore[assignment, method-assign]


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    """Have half as many processes again as there are cores: a third of the time tests wait.

    Not where they start servers, browsers and benchmarks, which are processes too.
    """
    cores = yield
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ or config.option.markexpr == "system":
        return cores
    return cores + cores // 2


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep the garbage collector away from thousands of tests and all that they import."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _few_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let SDKs load one certificate for each client that they make, not two hundred. Nobody here has TLS."""
    path = tmp_path_factory.mktemp("certificates") / "one.pem"
    end = "-----END CERTIFICATE-----\n"
    path.write_text(certifi.contents().partition(end)[0] + end, encoding="utf-8")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SSL_CERT_FILE", str(path))
        yield


@pytest.fixture(autouse=True)
def llm_user_path(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty llm configuration directory, so that no key or alias of this machine leaks in."""
    path = tmp_path_factory.mktemp("llm-user")
    monkeypatch.setenv("LLM_USER_PATH", str(path))
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)  # shown in commands to type
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.fixture(autouse=True)
def _no_leftover_plugins() -> Iterator[None]:
    """Unregister what a test registered with llm's and Datasette's plugin managers."""
    from datasette.plugins import pm as datasette_pm
    from llm.plugins import load_plugins
    from llm.plugins import pm as llm_pm

    load_plugins()
    before = [(pm, set(pm.get_plugins())) for pm in (datasette_pm, llm_pm)]
    yield
    for pm, plugins in before:
        for plugin in set(pm.get_plugins()) - plugins:
            pm.unregister(plugin)


@pytest.fixture
def leaky_clients() -> Iterator[None]:
    """Free the clients that a plugin has left open, before the next test has an event loop for them."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    # What is left is there to stay, such as the modules of an SDK: the next one need not go over it.
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_leftover_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of one test are words in the texts of another."""
    from datasette_llm import secrecy

    monkeypatch.setattr(secrecy, "_keys", type(secrecy._keys)())
    monkeypatch.setattr(secrecy, "_windows", None)


@pytest.fixture
def llm_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user directory of llm's, with room for templates."""
    home = tmp_path / "llm"
    (home / "templates").mkdir(parents=True)
    monkeypatch.setenv("LLM_USER_PATH", str(home))
    return home
