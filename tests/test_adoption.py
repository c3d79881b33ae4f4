"""Models whose code makes its clients itself, in all the ways in which code can: their prompts share them."""

from __future__ import annotations

import copy
import functools
import logging
import sys
import textwrap
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import llm
import pytest

from datasette_llm.calls.clients import adoption, leases, makes, rebinding, speakeasy
from datasette_llm.calls.clients.adoption import shares_clients
from datasette_llm.calls.clients.identity import CannotShareError, frozen
from datasette_llm.calls.clients.pool import ClientPool
from datasette_llm.calls.clients.transport import client_factory, library_of, library_that
from datasette_llm.calls.failures import classify
from datasette_llm.calls.http_answers import HttpAnswers

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.real_clock  # Threads load what clients need.

HEAD = """
import llm
import httpx
from httpx import AsyncClient

class Model(llm.AsyncKeyModel):
    model_id = "written"
    can_stream = True
    needs_key = "written"
"""

#: What a plugin may write to get the client of its prompt, and what helpers it needs for that.
WAYS = {
    "a class": ("client = AsyncClient(base_url='http://x')", ""),
    "an attribute of a module": ("client = httpx.AsyncClient(base_url='http://x')", ""),
    "a context": ("async with AsyncClient(base_url='http://x') as client:\n    pass", ""),
    "a helper": ("client = make()", "def make():\n    return AsyncClient(base_url='http://x')"),
    "a helper's helper": (
        "client = outer()",
        """
def outer():
    return make("x")

def make(host, *, scheme="http"):
    return AsyncClient(base_url=f"{scheme}://{host}")
""",
    ),
    "a helper that calls itself": (
        "client = make(2)",
        """
def make(n):
    return AsyncClient(base_url="http://x") if n == 0 else make(n - 1)
""",
    ),
    "a decorated helper": (
        "client = make()",
        """
import functools

def same(f):
    @functools.wraps(f)
    def inner(*a, **k):
        return f(*a, **k)
    return inner

@same
def make():
    return AsyncClient(base_url="http://x")
""",
    ),
    "a generator": ("client = next(make())", "def make():\n    yield AsyncClient(base_url='http://x')"),
    "a lambda": ("client = (lambda: AsyncClient(base_url='http://x'))()", ""),
    "a class that is handed on": (
        "client = make(httpx.AsyncClient)",
        "def make(kind, **options):\n    return kind(base_url='http://x', **options)",
    ),
    "an import": ("import httpx as h\nclient = h.AsyncClient(base_url='http://x')", ""),
    "an import of a name": ("from httpx import AsyncClient as C\nclient = C(base_url='http://x')", ""),
    "an import in a helper": (
        "client = make()",
        """
def make():
    import json, httpx
    assert json.loads("1")
    return httpx.AsyncClient(base_url="http://x")
""",
    ),
    "a method": (
        "client = self.make()",
        """
    where = "http://x"

    def make(self):
        return AsyncClient(base_url=self.where)
""",
    ),
    "a static method": (
        "client = self.make('http://x')",
        """
    @staticmethod
    def make(url):
        return AsyncClient(base_url=url)
""",
    ),
    "a class method": (
        "client = self.make()",
        """
    where = "http://x"

    @classmethod
    def make(cls):
        return AsyncClient(base_url=cls.where)
""",
    ),
}


@contextmanager
def written(
    get_client: str, helpers: str = "", check: str = "True", name: str = "a_plugin"
) -> Iterator[type[Any]]:
    """A plugin's module with a model that notes each client that its prompts get."""
    body = textwrap.indent(get_client, " " * 8)
    execute = (
        "    async def execute(self, prompt, stream, response, conversation=None, key=None, *, mark='kw'):\n"
        f"{body}\n"
        f"        self.notes.append((client, key, mark, self.__class__, {check}))\n"
        "        yield 'answer'\n"
    )
    module = types.ModuleType(name)
    sys.modules[name] = module
    methods, functions = (helpers, "") if "(self" in helpers or "method" in helpers else ("", helpers)
    exec(compile(f"{HEAD}\n{methods}\n{execute}\n{functions}\n", name, "exec"), vars(module))
    try:
        yield module.Model
    finally:
        del sys.modules[name]


class Notes(list[Any]):
    @property
    def clients(self) -> list[Any]:
        """The clients that are really behind what the prompts got."""
        return [getattr(client, "_leased", client) for client, *_ in self]


async def ask(model: Any, key: str = "key-1") -> None:
    assert await model.prompt("x", key=key, stream=False).text() == "answer"


def new(kind: type[Any]) -> Any:
    model = kind()
    model.notes = Notes()
    return model


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_is_found_however_the_code_gets_it(way: str) -> None:
    with written(*WAYS[way], "isinstance(client, AsyncClient)") as kind:
        module = sys.modules["a_plugin"]
        copy.copy(kind())  # The first copy leaves a cache of the copy module's in the class.
        before = dict(vars(module)), dict(vars(kind))
        assert shares_clients(kind())
        model, pool = new(kind), ClientPool()
        assert pool.adopt(model)
        await pool.prepare(model, "key-1")
        for key in ("key-1", "key-1", "key-2"):
            await ask(model, key)
        first, again, other = model.notes.clients
        assert first is again
        assert other is not first
        assert isinstance(first.client, httpx.AsyncClient)
        assert first.client.base_url == "http://x"
        # Keyword defaults, the class and isinstance() are as in the code as it was written.
        assert [note[1:] for note in model.notes] == [
            (key, "kw", kind, True) for key in ("key-1", "key-1", "key-2")
        ]
        assert (dict(vars(module)), dict(vars(kind))) == before
        await pool.aclose()
        assert first.client.is_closed


async def test_super_and_the_attributes_of_a_function_carry_over() -> None:
    with written("client = self.make()", "    def make(self):\n        return 'of the base'") as base:
        space = vars(sys.modules["a_plugin"])
        exec(
            "class Sub(Model):\n"
            "    def make(self):\n"
            "        assert super().make() == 'of the base'\n"
            "        return AsyncClient(base_url='http://x')\n"
            "    make.note = 1\n",
            space,
        )
        model, pool = new(space["Sub"]), ClientPool()
        assert issubclass(type(model), base)
        assert pool.adopt(model)
        await ask(model)
        await ask(model)
        first, again = model.notes.clients
        assert first is again
        assert model.make.note == 1
        assert "make" in vars(model)
        await pool.aclose()


@pytest.mark.parametrize("form", ["super()", "super(Sub, self)"])
async def test_what_an_inherited_method_makes_is_shared_where_a_model_calls_it(form: str) -> None:
    with written(
        "client = self.make()", "    def make(self):\n        return httpx.AsyncClient(base_url='http://x')"
    ):
        space = vars(sys.modules["a_plugin"])
        exec(
            "class Sub(Model):\n"
            "    async def execute(self, prompt, *args, **kwargs):\n"
            f"        async for chunk in {form}.execute(prompt, *args, **kwargs):\n"
            f"            assert {form}.model_id == 'written'\n"
            "            yield chunk\n"
            "    def make(self):\n"
            f"        return {form}.make()\n"
            # A second step up.
            "class SubSub(Sub):\n"
            "    async def execute(self, prompt, *args, **kwargs):\n"
            "        async for chunk in super().execute(prompt, *args, **kwargs):\n"
            "            yield chunk\n",
            space,
        )
        for kind in (space["Sub"], space["SubSub"]):
            copy.copy(kind())
            before = dict(vars(kind)), dict(space)
            assert shares_clients(kind())
            model, pool = new(kind), ClientPool()
            assert pool.adopt(model)
            for key in ("key-1", "key-1", "key-2"):
                await ask(model, key)
            first, again, other = model.notes.clients
            assert first is again
            assert other is not first
            assert model.notes[0][3] is kind
            assert (dict(vars(kind)), dict(space)) == before
            await pool.aclose()


async def test_what_the_code_finds_meanwhile_counts() -> None:
    class Fake:
        pass

    with written("client = AsyncClient()") as kind:
        await ask_adopted(kind)
        vars(sys.modules["a_plugin"])["AsyncClient"] = Fake
        (client,) = await ask_adopted(kind)
        assert isinstance(client, Fake)


async def ask_adopted(kind: type[Any], times: int = 1) -> list[Any]:
    model, pool = new(kind), ClientPool()
    pool.adopt(model)
    for _ in range(times):
        await ask(model)
    clients: list[Any] = model.notes.clients
    await pool.aclose()
    for client in clients:
        if isinstance(client, httpx.AsyncClient):
            await client.aclose()
    return clients


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("transport=httpx.MockTransport(print)", "it was given a MockTransport"),
        ("event_hooks={'response': [print]}", "it was given a builtin_function_or_method"),
        ("verify=httpx.create_ssl_context()", "it was given a SSLContext"),
    ],
)
async def test_a_client_that_can_be_nobody_elses_is_made_as_ever_and_that_is_told_once(
    arguments: str, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "_told", set())
    caplog.set_level(logging.DEBUG, "datasette_llm")
    with written(f"client = httpx.AsyncClient({arguments})") as kind:
        first, second = await ask_adopted(kind, 2)
        assert first is not second
        assert isinstance(first, httpx.AsyncClient)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"The model written makes a client for each prompt: AsyncClient: {why}"]


async def test_code_that_writes_to_its_module_is_left_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "_told", set())
    caplog.set_level(logging.DEBUG, "datasette_llm")
    helper = """
shared = None

def make():
    global shared
    shared = shared or AsyncClient()
    return shared
"""
    with written("client = make()", helper) as kind:
        model = new(kind)
        assert not ClientPool().adopt(model)
        assert "execute" not in vars(model)
        assert not shares_clients(model)
    assert "make writes to the names of its module" in caplog.text


async def test_equal_settings_share_and_others_do_not() -> None:
    settings = [
        "timeout=httpx.Timeout(None, connect=1.0)",
        "timeout=httpx.Timeout(None, connect=2.0)",
        "headers={'a': '1'}",
        "headers={'a': '2'}",
        "auth=httpx.BasicAuth('u', 'p')",
        "auth=httpx.BasicAuth('u', 'q')",
        "base_url=httpx.URL('http://x/1')",
        "base_url=httpx.URL('http://x/2')",
        "follow_redirects=True",
        "follow_redirects=1",
    ]
    seen = []
    for arguments in settings:
        with written(f"client = httpx.AsyncClient({arguments})") as kind:
            model, pool = new(kind), ClientPool()
            pool.adopt(model)
            await ask(model)
            await ask(model)
            assert model.notes.clients[0] is model.notes.clients[1]
            seen.append(str(next(iter(pool._sets))))
            await pool.aclose()
    assert len(set(seen)) == len(settings)


async def test_clients_of_which_no_two_are_alike_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "MOST_SETS", 3)
    with written("client = AsyncClient(headers={'n': str(len(self.notes))})") as kind:
        model, pool = new(kind), ClientPool()
        pool.adopt(model)
        for _ in range(6):
            await ask(model)
        assert len(pool._sets) == 3
        own = model.notes.clients[3:]
        assert all(type(client) is httpx.AsyncClient for client in own)
        await pool.aclose()
        for client in own:
            await client.aclose()


async def test_an_error_of_the_constructor_is_the_prompts() -> None:
    with written("client = AsyncClient(base_url=3)") as kind:
        model, pool = new(kind), ClientPool()
        pool.adopt(model)
        with pytest.raises(TypeError, match="URL"):
            await ask(model)
        assert pool.empty
        await pool.aclose()


async def test_a_model_moves_from_pool_to_pool() -> None:
    with written("client = AsyncClient()") as kind:
        model = new(kind)
        for _ in range(2):
            pool = ClientPool()
            assert pool.adopt(model)
            await ask(model)
            await pool.aclose()
        await ask(model)  # The pool is closed: a client of its own.
        first, second, own = model.notes.clients
        assert first is not second
        assert type(own) is httpx.AsyncClient
        await own.aclose()


async def test_models_without_http_their_sync_twins_and_subclasses_of_clients_are_left_alone() -> None:
    with written("client = 'none'") as kind:
        assert not ClientPool().adopt(new(kind))
    with written("client = httpx.Client()\nclient.close()") as kind:
        assert not ClientPool().adopt(new(kind))
    with written("client = Mine()", "class Mine(AsyncClient):\n    pass") as kind:
        assert not ClientPool().adopt(new(kind))

    class Odd(llm.AsyncModel):
        model_id = "odd"
        execute = functools.partialmethod(print)  # type: ignore[assignment]

    assert not ClientPool().adopt(Odd())


def test_a_lease_is_given_back_when_the_prompt_is_done_with_it() -> None:
    client = leases.SharedClient(leases.Made(object(), lambda: None))  # type: ignore[arg-type, return-value]
    lease, other = leases.Lease(client), leases.Lease(client)
    assert client.busy == 2
    del lease
    assert client.busy == 1
    assert copy.copy(other.__class__) is object


async def test_a_lease_may_be_entered_and_closed_and_the_client_stays_open() -> None:
    client = leases.SharedClient(leases.Made(httpx.AsyncClient(), lambda: None))  # type: ignore[arg-type, return-value]
    async with leases.Lease(client) as lease:
        await lease.aclose()
        await lease.close()
    assert not client.client.is_closed
    await client.client.aclose()


def test_a_module_whose_clients_are_leased_is_a_module_in_all_else() -> None:
    module = types.ModuleType("a_library")
    seen = rebinding.ModuleStandIn(module, lambda value: value)
    seen.timeout = 3
    assert (vars(module)["timeout"], seen.timeout) == (3, 3)
    assert "timeout" in dir(seen)
    assert repr(seen) == repr(module)


def test_settings_of_a_client_are_told_apart_by_what_they_say() -> None:
    names = {"a": "1"}
    assert frozen(httpx.Headers(names)) == frozen(httpx.Headers(names)) != frozen(httpx.Headers({"a": "2"}))
    assert frozen(httpx.URL("http://x")) != frozen(httpx.URL("http://y"))
    assert frozen(httpx.Timeout(1)) == frozen(httpx.Timeout(1)) != frozen(httpx.Timeout(2))


def test_what_is_no_sdk_has_no_library_and_no_factory() -> None:
    assert library_of(int) is None
    assert client_factory(types.ModuleType("another")) is None
    assert library_that(types.ModuleType("another")) is httpx


def test_a_wrapper_that_passes_nothing_on_is_not_shared() -> None:
    class Wrapper:
        def __init__(self, **options: Any) -> None:
            self.http = httpx.AsyncClient()

    make = makes.WrapperMake(Wrapper, httpx)
    with pytest.raises(CannotShareError, match="does not pass on"):
        make.build((), {}, None)


def test_pydantic_classes_are_made_once_for_each_type_and_no_other() -> None:
    config: Any = {"arbitrary_types_allowed": True}
    once = speakeasy.create_model_once
    made = [
        once("M", body=(body, ...), __config__=config)
        for body in (int | str, str | int, list[int | str], list[str | int], dict[str, int], int)
    ]
    assert len(set(made)) == len(made)
    assert once("M", body=(list[int], ...), __config__=config) is once(
        "M", body=(list[int], ...), __config__=config
    )
    assert once("M", body=(int, 3)).__name__ == "M"


def test_what_was_answered_tells_what_an_exception_does_not() -> None:
    class Response:
        headers = {"retry-after": "3"}  # noqa: RUF012
        is_closed = True

        def __init__(self, status: int) -> None:
            self.status_code = status

    def told(error: Exception, status: int) -> Any:
        answers = HttpAnswers()
        answers.saw(Response(status))
        answers.attach(error)
        failure = classify(error)
        return failure.kind, failure.status, failure.retry_after

    assert told(llm.ModelError("hm"), 429) == ("throttled", 429, 3.0)
    assert told(llm.ModelError("hm"), 500) == ("transient", 500, 3.0)
    assert told(llm.ModelError("hm"), 400) == ("permanent", 400, None)
    assert told(ConnectionError("reset"), 503) == ("transient", 503, 3.0)
    # What the exception itself says counts more, and an answer that was whole says nothing.
    assert told(ValueError("a bug"), 200) == ("permanent", None, None)
