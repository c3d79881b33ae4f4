"""Attachments that are only an address: who asks their hosts, how often, and whose error an answer is."""

from __future__ import annotations

import base64
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

import llm
import pytest

from datasette_llm import LLM
from datasette_llm.calls import attachments
from datasette_llm.calls.attachments import AttachmentError
from datasette_llm.calls.clients import transport
from datasette_llm.calls.failures import classify
from datasette_llm.tasks.root import drain

from .fakes import FakeModel, registered
from .hooks import datasette_with

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

pytestmark = pytest.mark.real_clock


class Host:
    """Serves files; ``asked`` are the requests."""

    url = ""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.connections = 0


@contextmanager
def host_of_files() -> Iterator[Host]:
    host = Host()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        answers: ClassVar = {
            "/bird.png": (200, "image/png; charset=x"),
            "/moved": (302, None),
            "/odd": (200, None),
        }

        def setup(self) -> None:
            host.connections += 1
            super().setup()

        def do_HEAD(self) -> None:
            host.asked.append((self.command, self.path))
            status, kind = self.answers.get(self.path.partition("?")[0]) or (int(self.path[1:]), "text/plain")
            self.send_response(status)
            if status == 302:
                self.send_header("location", "/bird.png")
            if kind:
                self.send_header("content-type", kind)
            self.send_header("content-length", "3")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"png")

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    host.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Viewer(FakeModel):
    """Takes images, and notes what it is shown."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attachment_types = {"image/png"}
        self.shown: list[tuple[str | None, str | None]] = []

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[Any, None]:
        parts = [part for message in prompt.messages for part in message.parts]
        inline = [found for part in parts if (found := getattr(part, "attachment", None)) is not None]
        for attachment in inline or prompt.attachments:
            self.shown.append((attachment.url, attachment.resolve_type()))
            if prompt.prompt == "content":
                try:
                    assert attachment.base64_content() == base64.b64encode(b"png").decode()
                except Exception as error:
                    # As plugins do.
                    raise ValueError("cannot encode") from error
        async for chunk in super().execute(prompt, stream, response, conversation):
            yield chunk


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "_known", type(attachments._known)())


@pytest.fixture
def _llm_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """llm's own requests, which block the event loop, fail the test."""

    def ask(*_: Any, **__: Any) -> Any:
        raise AssertionError("llm asked for a type in the event loop")

    monkeypatch.setattr(transport.library_that(llm.models).Client, "send", ask)


@pytest.mark.usefixtures("_llm_asks_nobody")
async def test_types_are_found_once_over_few_connections_by_a_map() -> None:
    model = Viewer()
    with host_of_files() as host, registered(model):
        async with LLM(datasette_with()).group("fake", concurrency=2) as group:
            rows = [f"{host.url}/bird.png", f"{host.url}/moved"] * 5

            def to_prompt(url: str) -> dict[str, Any]:
                return {"prompt": "x", "attachments": [llm.Attachment(url=url)]}

            async for url, response in group.map(rows, to_prompt):
                assert await response.text()
                (shown,) = response.prompt.attachments
                assert (shown.url, shown.type, shown.id()) == (url, "image/png", llm.Attachment(url=url).id())
        assert len(host.asked) <= 6
        assert host.connections <= 2


@pytest.mark.usefixtures("_llm_asks_nobody")
async def test_prompts_alone_and_in_conversations_find_them_too_and_leave_the_callers_as_they_were() -> None:
    with host_of_files() as host, registered(Viewer()):
        mine = llm.Attachment(url=f"{host.url}/bird.png")
        model = await LLM(datasette_with()).model("fake")
        assert await (await model.prompt("x", attachments=[mine])).text()
        conversation = model.conversation()
        assert await (await conversation.prompt("x", attachments=[mine])).text()
        assert len(host.asked) == 1
        assert mine.type is None
        await drain()


@pytest.mark.usefixtures("_llm_asks_nobody")
async def test_chains_their_tools_and_histories_go_the_same_way() -> None:
    class Caller(Viewer):
        async def execute(
            self, prompt: Any, stream: bool, response: Any, conversation: Any = None
        ) -> AsyncGenerator[Any, None]:
            async for chunk in super().execute(prompt, stream, response, conversation):
                yield chunk
            if prompt.prompt == "look":
                response.add_tool_call(llm.ToolCall("camera", {}, "1"))

    viewer = Caller()
    with host_of_files() as host, registered(viewer):
        bird, moved, other = (f"{host.url}/{name}" for name in ("bird.png", "moved", "bird.png?2"))

        def camera() -> llm.ToolOutput:
            """Take a picture."""
            return llm.ToolOutput(output="taken", attachments=[llm.Attachment(url=moved)])

        async with LLM(datasette_with()).group("fake") as model:
            with pytest.raises(TypeError):
                model.chain("look", nonsense=1, attachments=[llm.Attachment(url=bird)])
            chain = model.chain("look", tools=[camera], attachments=[llm.Attachment(url=bird)])
            assert await chain.text()
            assert [viewer.shown[0], viewer.shown[-1]] == [
                (bird, "image/png"),
                (moved, "image/png"),
            ]
            assert [found.url for found in chain.prompt.attachments] == [bird]
            history = [llm.user("x", llm.Attachment(url=other))]
            assert await (await model.prompt("y", messages=history)).text()
            assert (other, "image/png") in viewer.shown
            with pytest.raises(AttachmentError, match="its host answered 503"):
                await model.chain("x", attachments=[llm.Attachment(url=f"{host.url}/503")]).text()
            assert (model.stats.retries, model.stats.throttled_seconds) == (0, 0)


@pytest.mark.usefixtures("_llm_asks_nobody")
@pytest.mark.parametrize("stream", [True, False])
async def test_content_is_fetched_while_the_loop_goes_on_and_forgotten(stream: bool) -> None:
    viewer = Viewer()
    with host_of_files() as host, registered(viewer):
        async with LLM(datasette_with()).group("fake") as model:
            two = [llm.Attachment(url=f"{host.url}/{name}") for name in ("bird.png", "moved")]
            response = await model.prompt("content", attachments=two, stream=stream)
            assert await response.text() == "content"
            assert response.attempts == 1
            assert [path for method, path in host.asked if method == "GET"] == [
                "/bird.png",
                "/moved",
                "/bird.png",
            ]
            for found in response.prompt.attachments:
                assert isinstance(found, attachments.LinkedAttachment)
                assert (found.fetched, found.content) == (None, None)
            assert model.stats.retries == 0


@pytest.mark.parametrize("status", [401, 403, 404, 429, 503])
async def test_what_the_host_answers_is_that_rows_error(status: int) -> None:
    with host_of_files() as host, registered(Viewer()):
        async with LLM(datasette_with()).group("fake") as group:
            rows = [f"{host.url}/{status}", f"{host.url}/bird.png"]
            said = {}
            async for url, response in group.map(
                rows, lambda url: {"prompt": "x", "attachments": [llm.Attachment(url=url)]}
            ):
                said[url] = response.error
                if response.error is not None:
                    with pytest.raises(AttachmentError):
                        await response.text()
            assert said[rows[1]] is None
            error = said[rows[0]]
            assert isinstance(error, AttachmentError)
            assert str(error) == f"the attachment {rows[0]}: its host answered {status}"
            assert classify(error).kind == "permanent"
            assert (group.stats.retries, group.stats.throttled_seconds, group.stats.failed) == (0, 0, 1)
            assert group.refusal is None


async def test_content_that_a_host_does_not_give_is_that_prompts_error() -> None:
    with host_of_files() as host, registered(Viewer()):
        model = await LLM(datasette_with()).model("fake")
        picture = llm.Attachment(url=f"{host.url}/401", type="image/png")
        response = await model.prompt("content", attachments=[picture])
        with pytest.raises(AttachmentError, match="its host answered 401") as caught:
            await response.text()
        assert classify(caught.value).kind == "permanent"
        good = llm.Attachment(url=f"{host.url}/bird.png")
        assert await (await model.prompt("content", attachments=[good])).text()
        await drain()


async def test_a_host_that_is_not_there_or_does_not_say() -> None:
    with host_of_files() as host, registered(Viewer()):
        model = await LLM(datasette_with()).model("fake")
        with pytest.raises(AttachmentError, match="does not say what type"):
            await model.prompt("x", attachments=[llm.Attachment(url=f"{host.url}/odd")])
        with pytest.raises(AttachmentError, match=r"127\.0\.0\.1:1/x: "):
            await model.prompt("x", attachments=[llm.Attachment(url="http://127.0.0.1:1/x")])
        # Of another event loop, or of nobody: a client for one request.
        (found,) = await attachments.find_types(None, [llm.Attachment(url=f"{host.url}/bird.png")])
        assert found.type == "image/png"
        with pytest.raises(ValueError, match="text/plain"):
            await model.prompt("x", attachments=[llm.Attachment(url=f"{host.url}/200")])
        await drain()


async def test_a_host_that_takes_too_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with host_of_files() as host, registered(Viewer()):
        model = await LLM(datasette_with()).model("fake")
        url = f"{host.url}/bird.png"
        monkeypatch.setattr(attachments, "CONTENT_SECONDS", 0)
        response = await model.prompt("content", attachments=[llm.Attachment(url=url)])
        with pytest.raises(AttachmentError, match=r"bird\.png"):
            await response.text()
        monkeypatch.setattr(attachments, "HOST_SECONDS", 0)
        with pytest.raises(AttachmentError, match=r"bird\.png"):
            await model.prompt("x", attachments=[llm.Attachment(url=f"{url}?another")])
        await drain()


async def test_types_of_few_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "MOST_REMEMBERED", 1)
    attachments._known.clear()
    with host_of_files() as host:
        for name in ("a", "b", "b", "a"):
            await attachments.find_types(None, [llm.Attachment(url=f"{host.url}/bird.png?{name}")])
        assert [path.rpartition("?")[2] for _, path in host.asked] == ["a", "b", "a"]


def test_outside_of_a_model_call_content_is_fetched_at_once_and_a_failure_is_put_in_words() -> None:
    attachment = attachments.LinkedAttachment(url="http://127.0.0.1:1/x", type="image/png")
    with pytest.raises(AttachmentError, match=r"127\.0\.0\.1:1/x: "):
        attachment.content_bytes()
