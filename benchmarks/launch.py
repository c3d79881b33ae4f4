"""Starting, steering and ending the server's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .provider import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent


def own_environment(directory: str | Path) -> dict[str, str]:
    """Return an environment that shows no plugin, configuration or key of this machine.

    Args:
        directory: where llm then has its files: models, aliases, keys.
    """
    return os.environ | {
        "DATASETTE_LOAD_PLUGINS": "datasette-secrets,datasette-llm",
        "LLM_LOAD_PLUGINS": "",
        "LLM_USER_PATH": str(directory),
    }


class Server:
    """A running server, seen from the process that started it. The calls are short, and block.

    Attributes:
        url: what an OpenAI client takes as its base URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def counts(self) -> dict[str, Any]:
        """What the server saw since it started or was last reset."""
        return self._ask("GET", "/counts")

    @property
    def prompts(self) -> tuple[dict[str, int], dict[str, int]]:
        """How often each prompt arrived, and how often it was answered in full."""
        counts = self._ask("GET", "/counts?prompts=1")
        return counts["seen"], counts["complete"]

    def configure(self, **settings: Any) -> None:
        """Start over with these settings; what is not given is the default."""
        self._ask("POST", "/settings", settings)

    def reset(self) -> None:
        """Set the counts to zero."""
        self._ask("POST", "/reset", {})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            found: dict[str, Any] = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(found["error"]["message"])
        return found


@contextmanager
def running_server(**settings: Any) -> Iterator[Server]:
    """Run the server in a process of its own, which ends with the block (or with this process).

    Args:
        settings: fields of ``Settings``.

    Raises:
        ValueError: if one of them is not a setting.
    """
    Settings().changed(settings)
    command = [sys.executable, "-m", "benchmarks.server", "--until-stdin-closes"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the benchmark server did not start")
            server = Server(url)
            if settings:
                server.configure(**settings)
            yield server
        finally:
            process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
