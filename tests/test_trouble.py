"""What kept a call from being answered, read from what clients raise: the same with aiohttp as without."""

from __future__ import annotations

import socket
import struct
from contextlib import closing
from typing import TYPE_CHECKING, Any

import anyio
import openai
import pytest

from datasette_llm.calls.failures import classify
from datasette_llm.calls.trouble import said_by, trouble_of
from datasette_llm.enrich.telling.kinds import kind_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from datasette_llm.pace.outcome import Trouble

pytestmark = pytest.mark.real_clock

CLIENTS = ["DefaultAsyncHttpxClient", "DefaultAioHttpClient"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # aiohttp has no other


async def trouble_with(client: str, url: str, silence: float = 10) -> Trouble:
    try:
        http_client = getattr(openai, client)()
    except (AttributeError, RuntimeError):
        pytest.skip("this openai has no client on aiohttp")
    timeout = openai.Timeout(10, read=silence)
    async with openai.AsyncOpenAI(
        api_key="x", base_url=url, http_client=http_client, max_retries=0, timeout=timeout
    ) as sdk:
        with pytest.raises(openai.APIConnectionError) as caught:
            await sdk.chat.completions.create(model="x", messages=[{"role": "user", "content": "x"}])
    found = trouble_of(caught.value, classify(caught.value))
    assert found is not None
    # And what is said of a row that fails so.
    assert kind_of(caught.value) == ("timed out" if found.silent else "connection lost")
    assert ("timed out" in said_by(caught.value)) == found.silent
    return found


@pytest.mark.parametrize("client", CLIENTS)
async def test_nobody_is_there(client: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = await trouble_with(client, f"http://127.0.0.1:{port}/v1")
    assert (found.what, found.alone, found.silent) == ("the connection is refused", False, False)
    assert found.address == f"127.0.0.1:{port}"


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_name_is_unknown(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = await trouble_with(client, "http://provider.invalid/v1")
    assert (found.what, found.alone, found.silent) == ("no such host name", False, False)


async def close(stream: Any) -> None:
    await stream.receive()


async def reset(stream: Any) -> None:
    await stream.receive()
    raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def break_off(stream: Any) -> None:
    await stream.receive()
    await stream.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("breaks", [close, reset, break_off])
async def test_a_connection_that_breaks_may_be_one_prompts_fault(
    client: str, breaks: Callable[[Any], Awaitable[None]]
) -> None:
    async def serve(stream: Any) -> None:
        async with stream:
            await breaks(stream)

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, serve)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        found = await trouble_with(client, f"http://127.0.0.1:{port}/v1")
        tasks.cancel_scope.cancel()
    assert (found.what, found.alone, found.silent) == ("the connection broke", True, False)


@pytest.mark.parametrize("client", CLIENTS)
async def test_silence_is_not_refusal(client: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        found = await trouble_with(client, f"http://127.0.0.1:{port}/v1", silence=0.2)
    assert (found.what, found.alone, found.silent) == ("no answer in time", True, True)
