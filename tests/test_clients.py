"""HTTP clients against a real server on the loopback interface, which counts its connections."""

from __future__ import annotations

import copy
import gc
import json
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import httpx2
import llm
import openai
import pytest
from anyio.abc import SocketAttribute
from datasette.app import Datasette
from llm.default_plugins.openai_models import AsyncChat, AsyncResponses

from datasette_llm import LLM
from datasette_llm.access import starting
from datasette_llm.calls import loading
from datasette_llm.calls.clients import leases, openai_models
from datasette_llm.calls.clients.pool import ClientPool

from .fakes import FakeModel, registered
from .patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from anyio.abc import SocketStream

pytestmark = pytest.mark.real_clock


class LoopbackProvider:
    """Answers chat completions; ``open`` and ``opened`` count connections, ``keys`` says who used them."""

    def __init__(self) -> None:
        self.open = 0
        self.opened = 0
        self.requests = 0
        self.running = 0
        self.keys: list[set[str]] = []
        self.headers: list[str] = []
        self.status = 200
        self.gate: anyio.Event | None = None
        self.changed = anyio.Event()
        self.url = ""

    def _change(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def until(self, condition: str) -> None:
        """Wait until an expression over this object's attributes holds."""
        with anyio.fail_after(PATIENCE_SECONDS):
            while not eval(condition, {}, vars(self)):
                await self.changed.wait()

    async def serve(self, stream: SocketStream) -> None:
        self.open += 1
        self.opened += 1
        keys: set[str] = set()
        self.keys.append(keys)
        self._change()
        buffered = b""
        try:
            async with stream:
                while True:
                    while b"\r\n\r\n" not in buffered:
                        buffered += await stream.receive()
                    head, _, buffered = buffered.partition(b"\r\n\r\n")
                    lines = [line.partition(":") for line in head.decode().split("\r\n")[1:]]
                    headers = {name.lower(): value.strip() for name, _, value in lines}
                    while len(buffered) < int(headers.get("content-length", 0)):
                        buffered += await stream.receive()
                    body = json.loads(buffered)
                    buffered = b""
                    keys.add(headers["authorization"])
                    self.requests += 1
                    self.running += 1
                    self._change()
                    if self.gate is not None:
                        await self.gate.wait()
                    self.running -= 1
                    await stream.send(self.reply(body))
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass
        finally:
            self.open -= 1
            self._change()

    def reply(self, body: dict[str, Any]) -> bytes:
        text = "hello " + body["messages"][-1]["content"]
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        content = json.dumps(answer if self.status == 200 else {"error": {"message": "no"}}).encode()
        head = [
            f"HTTP/1.1 {self.status} X",
            "content-type: application/json",
            f"content-length: {len(content)}",
            *self.headers,
        ]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + content


@asynccontextmanager
async def serving() -> AsyncIterator[LoopbackProvider]:
    provider = LoopbackProvider()
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as group,
    ):
        provider.url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}/v1"
        group.start_soon(listener.serve, provider.serve)
        yield provider
        group.cancel_scope.cancel()


def chat_model(provider: LoopbackProvider, **kwargs: Any) -> AsyncChat:
    """A model object as models.py holds it: a shallow copy that nobody else has."""
    return copy.copy(AsyncChat("m", api_base=provider.url, **kwargs))


async def ask(model: Any, key: str = "key-1", prompt: str = "you") -> str:
    response: str = await model.prompt(prompt, key=key, stream=False).text()
    return response


async def test_one_connection_serves_prompt_after_prompt() -> None:
    async with serving() as provider:
        pool = ClientPool()
        model = chat_model(provider)
        assert pool.adopt(model)
        for _ in range(5):
            assert await ask(model) == "hello you"
        assert (provider.requests, provider.opened) == (5, 1)
        await pool.aclose()


async def test_closing_the_pool_closes_its_connections() -> None:
    async with serving() as provider:
        pool = ClientPool()
        model = chat_model(provider)
        pool.adopt(model)
        await ask(model)
        assert provider.open == 1
        await pool.aclose()
        await provider.until("open == 0")
        assert pool.closed


async def test_two_keys_never_share_a_connection() -> None:
    async with serving() as provider:
        pool = ClientPool()
        model = chat_model(provider)
        pool.adopt(model)
        for key in ("key-1", "key-2", "key-1", "key-2"):
            await ask(model, key)
        assert provider.keys == [{"Bearer key-1"}, {"Bearer key-2"}]
        await pool.aclose()


async def test_two_models_of_one_owner_share_connections_for_the_same_key() -> None:
    async with serving() as provider:
        pool = ClientPool()
        first, second = chat_model(provider), chat_model(provider)
        assert pool.adopt(first)
        assert pool.adopt(second)
        await ask(first)
        await ask(second)
        assert provider.opened == 1
        await pool.aclose()


async def test_a_model_with_other_headers_has_clients_of_its_own() -> None:
    async with serving() as provider:
        pool = ClientPool()
        first, second = chat_model(provider), chat_model(provider, headers={"x-team": "b"})
        pool.adopt(first)
        pool.adopt(second)
        await ask(first)
        await ask(second)
        assert provider.opened == 2
        await pool.aclose()


async def test_what_is_in_flight_spreads_over_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "REQUESTS_PER_CLIENT", 4)
    monkeypatch.setattr(leases, "MOST_CLIENTS", 3)
    async with serving() as provider:
        provider.gate = anyio.Event()
        pool = ClientPool()
        model = chat_model(provider)
        pool.adopt(model)
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(ask, model)
            await provider.until("running == 20")
            (clients,) = pool._sets.values()
            assert sorted(client.busy for client in clients.clients) == [6, 7, 7]
            provider.gate.set()
        assert [client.busy for client in clients.clients] == [0, 0, 0]
        await pool.aclose()
        await provider.until("open == 0")


async def test_a_cancelled_prompt_frees_its_client() -> None:
    async with serving() as provider:
        provider.gate = anyio.Event()
        pool = ClientPool()
        model = chat_model(provider)
        pool.adopt(model)
        async with anyio.create_task_group() as group:
            group.start_soon(ask, model)
            await provider.until("running == 1")
            group.cancel_scope.cancel()
        # The traceback of the cancellation may still hold the model's frame.
        gc.collect()
        (clients,) = pool._sets.values()
        assert [client.busy for client in clients.clients] == [0]
        provider.gate.set()
        await pool.aclose()
        await provider.until("open == 0")


async def test_the_observer_sees_every_status_and_its_headers() -> None:
    async with serving() as provider:
        seen: list[tuple[int, str | None, bool]] = []
        provider.headers = ["x-ratelimit-remaining-requests: 7"]

        def observe(status: int, headers: Any, age: float = 0.0) -> None:
            seen.append((status, headers.get("x-ratelimit-remaining-requests"), age >= 0))

        pool = ClientPool()
        model = chat_model(provider)
        pool.adopt(model, observe)
        await ask(model)
        provider.status = 429
        with pytest.raises(openai.RateLimitError):
            await ask(model)
        assert seen == [(200, "7", True), (429, "7", True)]
        await pool.aclose()


async def test_openai_does_not_retry_by_itself() -> None:
    async with serving() as provider:
        provider.status = 500
        pool = ClientPool()
        model = chat_model(provider)
        pool.adopt(model)
        with pytest.raises(openai.InternalServerError):
            await ask(model)
        assert provider.requests == 1
        await pool.aclose()


async def test_after_the_pool_is_closed_a_model_makes_clients_of_its_own() -> None:
    async with serving() as provider:
        pool = ClientPool()
        model = chat_model(provider)
        pool.adopt(model)
        await pool.aclose()
        client = model.get_client("key-1", async_=True)
        assert isinstance(client, openai.AsyncOpenAI)
        await client.close()


async def test_without_a_client_class_the_one_client_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_models, "client_factory", lambda _: None)
    async with serving() as provider:
        pool = ClientPool()
        model = chat_model(provider)
        pool.adopt(model)
        first, second = (model.get_client("key-1", async_=True) for _ in range(2))
        assert first._leased is second._leased
        await ask(model)
        await ask(model)
        assert provider.opened == 1
        await pool.aclose()
        await provider.until("open == 0")


async def test_responses_models_are_adopted_too() -> None:
    model = copy.copy(AsyncResponses("m", api_base="http://127.0.0.1:1/v1"))
    pool = ClientPool()
    assert pool.adopt(model)
    client = model.get_client("key-1", async_=True)
    assert client.max_retries == 0
    assert isinstance(client._client, httpx2.AsyncClient)
    await pool.aclose()


async def test_models_that_show_their_responses_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_OPENAI_SHOW_RESPONSES", "1")
    model = copy.copy(AsyncChat("m"))
    assert not ClientPool().adopt(model)
    assert "get_client" not in vars(model)


async def test_other_models_are_left_alone() -> None:
    class Other(llm.AsyncModel):
        model_id = "other"

        async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Any:
            yield "x"

    class OddChat(AsyncChat):
        def get_client(self, key: Any, async_: bool = False, region: str = "eu") -> Any:
            raise NotImplementedError

    odd: Any = OddChat
    for model in (Other(), odd("m")):
        assert not ClientPool().adopt(model)
        assert "get_client" not in vars(model)


async def test_the_class_is_not_touched() -> None:
    # The first copy of all leaves a cache of the copy module's in the class.
    model = copy.copy(AsyncChat("m"))
    before = dict(vars(AsyncChat))
    ClientPool().adopt(model)
    assert dict(vars(AsyncChat)) == before
    assert "get_client" not in vars(copy.copy(AsyncChat("m")))


async def test_the_sync_twin_of_the_factory_still_works() -> None:
    model = copy.copy(AsyncChat("m"))
    ClientPool().adopt(model)
    client = model.get_client("key-1")
    assert isinstance(client, openai.OpenAI)
    client.close()


async def test_what_the_first_client_takes_is_loaded_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threads_that_load(monkeypatch)
    await loading.load_in_thread(FakeModel())
    assert threads == []
    await loading.load_in_thread(AsyncChat("m"))
    await loading.load_in_thread(AsyncChat("m"))
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize(
    ("config", "loads"),
    [
        ({"default_model": "gpt-4o-mini"}, 1),
        ({"purposes": {"enrichments": {"model": "gpt-4o-mini"}, "query": {"model": "gpt-4o"}}}, 1),
        ({"default_model": "fake"}, 0),
        ({"default_model": "there-is-no-such-model"}, 0),
        ({}, 0),
    ],
)
async def test_a_server_that_is_up_loads_it_for_its_default_models(
    config: dict[str, Any], loads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threads_that_load(monkeypatch)
    monkeypatch.setattr(starting, "QUIET_SECONDS", 0)
    await starting.prepare(Datasette(memory=True, config={"plugins": {"datasette-llm": config}}))
    assert len(threads) == loads


@pytest.mark.parametrize(
    ("config", "loads"),
    [
        ({"workers": 1}, 1),
        ({"purposes": {"enrichments": {"workers": 1}}}, 1),
        ({"workers": 0}, 0),
        ({"default_model": "fake"}, 0),
    ],
)
async def test_a_server_that_is_up_loads_what_its_workers_need(
    config: dict[str, Any], loads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dask_source = pytest.importorskip("datasette_llm.calls.remote.dask_source")
    pytest.importorskip("distributed")
    threads: list[threading.Thread] = []
    monkeypatch.setattr(dask_source, "load_distributed", lambda: threads.append(threading.current_thread()))
    monkeypatch.setattr(starting, "QUIET_SECONDS", 0)
    await starting.prepare(Datasette(memory=True, config={"plugins": {"datasette-llm": config}}))
    assert len(threads) == loads
    assert threading.main_thread() not in threads


def threads_that_load(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    threads: list[threading.Thread] = []

    def load(model: Any, backend: str) -> None:
        threads.append(threading.current_thread())
        loading._loaded.add(type(model))

    monkeypatch.setattr(loading, "_loaded", set())
    monkeypatch.setattr(loading, "_load", load)
    return threads


async def test_the_first_client_of_a_pool_is_made_in_a_thread() -> None:
    threads: list[threading.Thread] = []

    class Chat(AsyncChat):
        def get_client(self, key: str | None, *, async_: bool = False) -> Any:
            threads.append(threading.current_thread())
            return super().get_client(key, async_=async_)  # type: ignore[no-untyped-call]

    async with serving() as provider:
        model = Chat("m", api_base=provider.url)  # type: ignore[no-untyped-call]
        pool = ClientPool()
        pool.adopt(model)
        await pool.prepare(model, "key-1")
        assert len(threads) == 1
        assert threads[0] is not threading.current_thread()
        assert await ask(model, "key-1") == "hello you"
        assert len(threads) == 1
        await pool.aclose()


async def test_a_group_that_is_cancelled_while_it_opens_leaves_no_client_open() -> None:
    made: list[openai.AsyncOpenAI] = []
    began = anyio.Event()

    class Chat(AsyncChat):
        def get_client(self, key: str | None, *, async_: bool = False) -> Any:
            made.append(super().get_client(key, async_=async_))  # type: ignore[no-untyped-call]
            anyio.from_thread.run_sync(began.set)
            return made[0]

    async def open_group(scope: anyio.CancelScope) -> None:
        datasette = Datasette(memory=True, config={"plugins": {"datasette-llm": {"default_model": "m"}}})
        with scope:
            async with LLM(datasette).group():
                await anyio.sleep_forever()

    with registered(Chat("m", key="key-1")):  # type: ignore[no-untyped-call, arg-type]
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()
            tasks.start_soon(open_group, scope)
            await began.wait()
            scope.cancel()
    assert [client.is_closed() for client in made] == [True]


async def test_a_client_that_cannot_be_made_is_the_first_prompts_error() -> None:
    class Chat(AsyncChat):
        def get_client(self, key: str | None, *, async_: bool = False) -> Any:
            raise RuntimeError("no certificates")

    model = Chat("m")  # type: ignore[no-untyped-call]
    pool = ClientPool()
    pool.adopt(model)
    await pool.prepare(model, "key-1")
    with pytest.raises(RuntimeError, match="no certificates"):
        model.get_client("key-1", async_=True)
    await pool.aclose()


async def test_a_model_that_makes_its_clients_itself_is_not_prepared() -> None:
    await ClientPool().prepare(FakeModel(), "key-1")
