"""No key in use leaves the process in a text of ours, and none is stored, whatever a provider quotes."""

from __future__ import annotations

import json
import logging
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from llm.default_plugins.openai_models import AsyncChat

import datasette_llm
from datasette_llm import secrecy
from datasette_llm.secrecy import keep_secret, redacted

from .enrich_tables import TableFile
from .fakes import FakeModel, registered
from .spies import watched
from .test_cli import run

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

KEY = "sk-proj-Qk7vXw2rTn5LmZ8cYb4HdJ6gPf9sAe3u"
# What none of it may be seen in any output: the ends that providers leave, and more.
TRACES = [KEY[8:14], KEY[-4:], KEY[12:20], KEY[:11]]

QUOTES = [
    KEY,
    f"{KEY[:11]}...{KEY[-4:]}",
    f"{KEY[:8]}{'*' * 20}{KEY[-4:]}",
    f"{KEY[:10]}***...{KEY[-4:]}",
    f"{KEY[:12]}...",
    f"****{KEY[-4:]}",
    f"…{KEY[-5:]}",
    f"{KEY[:9]}…{KEY[-4:]}",
    f"{KEY[:10]}[...]{KEY[-4:]}",
    f"{KEY[:9]}xxxxxxxx{KEY[-4:]}",
    f"ending in {KEY[-4:]}",
    f"(starting with {KEY[:12]})",
    f"https://provider.example/v1?key={KEY}&alt=sse",
    f"Bearer {KEY}",
    f"a part of it, {KEY[12:24]}",
]


def assert_clean(text: str) -> None:
    for trace in TRACES:
        assert trace not in text, text


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_key_is_taken_out(quote: str) -> None:
    told = f"Incorrect API key provided: {quote}. You can find your key at provider.example."
    assert redacted(told) == told
    keep_secret(KEY)
    clean = redacted(told)
    assert_clean(clean)
    assert clean.startswith("Incorrect API key provided: ")
    assert clean.endswith(". You can find your key at provider.example.")
    assert "***" in clean


def test_other_texts_are_left_alone() -> None:
    keep_secret(KEY)
    keep_secret("none")
    keep_secret("")
    keep_secret(None)
    for text in ("", "429 Too Many Requests ... try again in 20 s", "nonetheless, sk- is how keys begin"):
        assert redacted(text) == text
    assert redacted("the key none is wrong") == "the key *** is wrong"
    keep_secret("sk-no-key-required")
    keep_secret("a sentence from the list")
    for text in ("a key is required", "the list goes on from there"):
        assert redacted(text) == text
    assert redacted("wrong key: sk-no-key-required") == "wrong key: ***"
    assert redacted("wrong key: sk-no***ired") == "wrong key: ***"


def test_a_key_in_other_spellings() -> None:
    key = 'a"key/with+odd=characters'
    keep_secret(key)
    for spelling in (json.dumps({"key": key}), "?key=a%22key%2Fwith%2Bodd%3Dcharacters", repr(key)):
        assert "odd" not in redacted(spelling)


def test_the_keys_that_are_remembered_are_limited() -> None:
    for number in range(secrecy.MOST_KEYS + 10):
        keep_secret(f"{number:08} is a key")
        keep_secret(KEY)
    assert len(secrecy._keys) == secrecy.MOST_KEYS
    assert_clean(redacted(KEY))


async def refuses(prompt: str) -> AsyncGenerator[str, None]:
    raise PermissionError(f"wrong key {prompt}")
    yield ""


async def test_the_log_of_what_nobody_read(caplog: pytest.LogCaptureFixture) -> None:
    with watched(FakeModel(refuses)) as llm:
        async with llm.group() as model:
            for quote in QUOTES[:8]:
                await model.prompt(quote, key=KEY)
    assert caplog.text.count("nobody read it") == 8
    assert_clean(caplog.text)
    # What a plugin gets is the provider's own object.
    assert KEY in str(model.group._responses[0].error)


def test_tracebacks_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("datasette_llm")
    keep_secret(KEY)
    try:
        raise ValueError(KEY)
    except ValueError:
        logger.exception("It failed with %s", KEY)
    assert "Traceback" in caplog.text
    assert "ValueError: ***" in caplog.text
    assert_clean(caplog.text)
    try:
        raise ValueError("nothing secret")
    except ValueError:
        logger.exception("It failed")
    assert "ValueError: nothing secret" in caplog.text
    assert caplog.records[-1].exc_info is not None


def test_all_modules_log_where_keys_are_taken_out() -> None:
    """A filter of a logger does not see what the loggers below it are given."""
    for path in Path(datasette_llm.__file__).parent.rglob("*.py"):
        # Loggers of others may be told to be quiet.
        names = re.findall(r"getLogger\(([^()]*)\)(?!\.)", path.read_text())
        assert set(names) <= {'"datasette_llm"'}, path


class Quoting(BaseHTTPRequestHandler):
    """Refuses each request, and quotes its key: each time in another way."""

    status = 401
    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        quote = QUOTES[Quoting.asked % len(QUOTES)]
        Quoting.asked += 1
        message = f"Incorrect API key provided: {quote}"
        body = json.dumps({"error": {"message": message, "code": quote, "type": "odd"}}).encode()
        self.send_response(self.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("x-request-id", KEY)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def quoting_provider(status: int) -> Iterator[str]:
    Quoting.status, Quoting.asked = status, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Quoting)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.real_clock
@pytest.mark.parametrize("flags", [[], ["--quiet"], ["--json"]], ids=["lines", "quiet", "json"])
@pytest.mark.parametrize("status", [401, 400, 422])
def test_an_enrichment_shows_and_stores_no_key(
    status: int, flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = TableFile(tmp_path, "create table t (id integer primary key, body, answer)")
    file.run_many("insert into t(body) values (?)", [(f"row {n}",) for n in range(30)])
    with quoting_provider(status) as url:
        model: Any = AsyncChat("quoting", model_name="quoting", api_base=url)
        with registered(model):
            result = run(
                "enrich", file.path, "t", "{{ body }}", "--model", "quoting", "--column", "answer",
                "--key", KEY, "--concurrency", "5", *flags,
            )  # fmt: skip
    file.close()
    assert Quoting.asked
    assert result.exit_code == 1
    assert_clean(result.output)
    assert_clean(result.stderr)
    assert_clean("\n".join(f"{r.getMessage()} {r.exc_text}" for r in caplog.records if "llm" in r.name))
    for path in tmp_path.iterdir():
        assert_clean(path.read_bytes().decode("latin-1"))
