"""Each provider's own plugin against a server that speaks its protocol: its prompts share HTTP clients.

The leaks of plugins that make a client for each prompt are no longer there: warnings of them are errors.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import socket
import stat
import sys
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import anyio
import anyio.to_thread
import pytest

from datasette_llm import LLM
from datasette_llm.calls.clients import transport
from datasette_llm.calls.clients.pool import ClientPool
from datasette_llm.pace.throttle import Throttle
from datasette_llm.tasks.root import drain

from .fakes import registered
from .hooks import datasette_with
from .protocols import FAMILIES, Answer, ProtocolServer, protocol_server

pytestmark = [
    pytest.mark.real_clock,
    # SDKs leave the generators of answers that they do not read to their end to the garbage collector, of
    # which trio warns. The connections below them are closed: a warning of one that is not is an error.
    pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:The `dict` method is deprecated"),  # llm-groq's
]

LIMITS = {
    "anthropic": {
        "anthropic-ratelimit-requests-limit": "600",
        "anthropic-ratelimit-requests-remaining": "599",
        "anthropic-ratelimit-requests-reset": "2026-01-01T00:00:00Z",
    },
    "mistral": {"x-ratelimit-limit-req-minute": "600", "x-ratelimit-remaining-req-minute": "599"},
}
USUAL_LIMITS = {
    "x-ratelimit-limit-requests": "600",
    "x-ratelimit-remaining-requests": "599",
    "x-ratelimit-reset-requests": "100ms",
}


async def until(condition: Any) -> None:
    """Wait until something holds that a server in another thread makes true."""
    with anyio.fail_after(20):
        while not condition():
            await anyio.to_thread.run_sync(lambda: None)


class Adopted:
    """A model that was adopted, and what its provider's answers were seen to be."""

    def __init__(self, server: ProtocolServer, **options: Any) -> None:
        self.model = server.model(**options)
        self.pool = ClientPool()
        self.seen: list[tuple[int, Any]] = []
        assert self.pool.adopt(self.model, self._observe)

    def _observe(self, status: int, headers: Any, age: float = 0.0) -> None:
        self.seen.append((status, headers))

    async def ask(self, prompt: str = "you", *, stream: bool = False, **kwargs: Any) -> str:
        text: str = await self.model.prompt(prompt, stream=stream, **kwargs).text()
        return text.strip()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
async def test_prompt_after_prompt_goes_over_one_connection(family: str, stream: bool) -> None:
    with protocol_server(family) as server:
        adopted = Adopted(server)
        for _ in range(4):
            assert await adopted.ask(stream=stream) == "hello from the model"
        assert (len(server.requests), server.connections, server.hidden_retries) == (4, 1, 0)
        await adopted.pool.aclose()
        await until(lambda: server.open_connections == 0)


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_headers_of_every_answer_are_seen(family: str) -> None:
    with protocol_server(family) as server:
        adopted = Adopted(server)
        server.script = [
            Answer(headers=LIMITS.get(family, USUAL_LIMITS)),
            Answer(status=429, headers={"retry-after": "7"}, message="slow down", code="rate_limit_error"),
        ]
        await adopted.ask()
        with pytest.raises(Exception, match="slow down"):
            await adopted.ask()
        (first, limits), (second, refusal) = adopted.seen
        assert (first, second) == (200, 429)
        assert dict(limits).items() >= LIMITS.get(family, USUAL_LIMITS).items()
        assert refusal["retry-after"] == "7"
        assert len(server.requests) == 2
        await adopted.pool.aclose()


@pytest.mark.parametrize("family", FAMILIES)
async def test_announced_limits_set_the_pace(family: str) -> None:
    with protocol_server(family) as server:
        model = server.model()
        server.script = Answer(headers=LIMITS.get(family, USUAL_LIMITS))
        with registered(model):
            async with LLM(datasette_with()).group(model.model_id) as group:
                await (await group.prompt("you")).text()
                throttle = group._supervisor.slots._throttle
                assert isinstance(throttle, Throttle)
                # 600 a minute, in every provider's spelling.
                assert throttle.rates()["announced"] == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
async def test_no_sdk_retries_by_itself(family: str) -> None:
    with protocol_server(family) as server:
        adopted = Adopted(server)
        for number, status in enumerate((429, 500, 503)):
            server.script = Answer(status=status, message="not now", code="overloaded_error")
            with pytest.raises(Exception, match="not now"):
                await adopted.ask()
            assert len(server.requests) == number + 1
        await adopted.pool.aclose()


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_refusal_is_seen_by_the_throttle_with_the_wait_it_asks_for(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    with protocol_server(family) as server:
        model = server.model()
        # Words that no plugin and nobody else recognises: only the answer itself says what it means.
        refused = Answer(status=429, headers={"retry-after-ms": "40"}, message="hm", code="odd")
        server.script = [refused, Answer("at last")]
        with registered(model):
            async with LLM(datasette_with()).group(model.model_id) as group:
                response = await group.prompt("you")
                assert (await response.text()).strip() == "at last"
                assert group.stats.retries == 1
                assert group.stats.throttled_seconds >= 0.03
        assert (len(server.requests), server.hidden_retries) == (2, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
async def test_a_cancelled_prompt_closes_its_connection(family: str, stream: bool) -> None:
    with protocol_server(family) as server:
        adopted = Adopted(server)
        server.script = Answer("word " * 50, delay=0.0 if stream else 30.0, pieces=50, gap=0.2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: adopted.ask(stream=stream))
            await until(lambda: server.requests)
            tasks.cancel_scope.cancel()
        await until(lambda: server.open_connections == 0)
        await adopted.pool.aclose()


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_response_that_is_cancelled_between_two_chunks_closes_its_connection(family: str) -> None:
    with protocol_server(family) as server:
        model = server.model()
        server.script = Answer("word " * 50, pieces=50, gap=0.2)
        with registered(model):
            async with LLM(datasette_with()).group(model.model_id) as group:
                response = await group.prompt("you", stream=True)
                async for _ in response:
                    break
                response.cancel()
                await until(lambda: server.open_connections == 0)


@pytest.mark.parametrize("family", FAMILIES)
async def test_two_keys_share_no_connection(family: str) -> None:
    if family == "groq":
        pytest.skip("llm-groq takes no key with a prompt")
    with protocol_server(family) as server:
        adopted = Adopted(server)
        adopted.model.key = None
        for key in ("key-1", "key-2", "key-1"):
            await adopted.ask(key=key)
        assert server.connections == 2
        sent = [str(request.headers) for request in server.requests]
        assert ["key-1" in headers for headers in sent] == [True, False, True]
        assert ["key-2" in headers for headers in sent] == [False, True, False]
        await adopted.pool.aclose()


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_group_and_a_standalone_prompt_both_share(family: str) -> None:
    with protocol_server(family) as server:
        model = server.model()
        with registered(model):
            facade = LLM(datasette_with())
            async with facade.group(model.model_id, concurrency=2) as group:
                async for _, response in group.map(range(12), str):
                    await response.text()
            assert server.connections <= 2
            before = server.connections
            for _ in range(3):
                alone = await facade.model(model.model_id)
                await (await alone.prompt("you")).text()
            assert server.connections == before + 1
            await drain()


@pytest.mark.parametrize("family", FAMILIES)
async def test_nothing_of_the_plugin_is_changed(family: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "datasette_llm")
    with protocol_server(family) as server:
        adopted = Adopted(server)
        kind = type(adopted.model)
        module = sys.modules[kind.__module__]
        before = dict(vars(kind)), dict(vars(module))
        await adopted.ask()
        assert (dict(vars(kind)), dict(vars(module))) == before
        assert "execute" not in vars(server.model())
        assert "makes a client for each prompt" not in caplog.text
        await adopted.pool.aclose()


async def test_a_responses_model_that_is_told_to_chat_shares_clients() -> None:
    from llm.default_plugins.openai_models import AsyncResponses

    with protocol_server("openai") as server:
        model = AsyncResponses("m", api_base=f"{server.url}/v1", key="sk-test")
        pool = ClientPool()
        assert pool.adopt(model)
        for _ in range(3):
            answer = model.prompt("you", chat_completions=True, stream=False)
            assert await answer.text() == "hello from the model"
        assert (len(server.requests), server.connections) == (3, 1)
        await pool.aclose()


#: The families whose SDKs have a transport on aiohttp.
FAST = ("openai", "anthropic")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", FAST)
async def test_with_aiohttp_and_without_it_the_same_is_kept(
    family: str,
    stream: bool,
    installed: bool,
    anyio_backend: tuple[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not installed:
        monkeypatch.setattr(transport, "leanest", lambda package, factory, *_: factory)
    with protocol_server(family) as server:
        adopted = Adopted(server)
        server.script = [Answer(), Answer(headers=USUAL_LIMITS), Answer(status=503, message="not now")]
        for _ in range(2):
            assert await adopted.ask(stream=stream) == "hello from the model"
        with pytest.raises(Exception, match="not now"):
            await adopted.ask(stream=stream)
        assert [status for status, _ in adopted.seen] == [200, 200, 503]
        assert adopted.seen[1][1]["x-ratelimit-limit-requests"] == "600"
        assert (len(server.requests), server.connections, server.hidden_retries) == (3, 1, 0)
        (clients,) = adopted.pool._sets.values()
        used = type(clients.clients[0].client._client._transport).__name__
        assert ("Aiohttp" in used) == (installed and anyio_backend[0] == "asyncio")
        server.script = Answer("word " * 50, delay=0.0 if stream else 30.0, pieces=50, gap=0.2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: adopted.ask(stream=stream))
            await until(lambda: len(server.requests) == 4)
            tasks.cancel_scope.cancel()
        await until(lambda: server.open_connections == 0)
        await adopted.pool.aclose()


@pytest.mark.parametrize("family", FAST)
async def test_a_proxy_of_the_environment_is_used(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with protocol_server(family) as proxy, protocol_server(family) as server:
        for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        adopted = Adopted(server)
        await adopted.ask()
        assert (len(server.requests), len(proxy.requests)) == (0, 1)
        await adopted.pool.aclose()


def sockets_to(port: int) -> list[socket.socket]:
    """Return the connections that this process has to a port of its own machine."""
    sockets = []
    for number in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                sockets.append(number)
    found = []
    for number in sockets:
        each = socket.socket(fileno=os.dup(number))
        with contextlib.suppress(OSError):
            if each.getpeername()[1:2] == (port,):
                found.append(each)
                continue
        each.close()
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="looks through file descriptors")
@pytest.mark.parametrize("family", FAMILIES)
async def test_a_peer_that_is_gone_is_noticed_within_a_minute(family: str) -> None:
    if "socket_factory" not in inspect.signature(aiohttp.TCPConnector).parameters:
        pytest.skip("this aiohttp cannot be told how to make sockets")
    with protocol_server(family) as server:
        adopted = Adopted(server)
        await adopted.ask()
        (connection,) = sockets_to(urlsplit(server.url).port or 0)
        with connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle = getattr(socket, "TCP_KEEPIDLE", None) or socket.TCP_KEEPALIVE  # type: ignore[attr-defined]
            first, each, times = (
                connection.getsockopt(socket.IPPROTO_TCP, option)
                for option in (idle, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert first + each * times <= 60
        await adopted.pool.aclose()
