"""A headless Chromium, driven through chromedriver by the W3C WebDriver protocol: no other package needed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from ..patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(
    not ((CHROMIUM and CHROMEDRIVER) or os.environ.get("CI")),
    reason="no browser: install chromium and chromium-driver (Debian's packages)",
)

#: Nothing but the page that is asked for: no profile of this machine, no request to anybody else.
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--window-size=1000,1100",
)

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # The protocol's own name for a reference to an element.


class Browser:
    """One window. Its methods block, so they run in a thread where a server runs in the event loop."""

    def __init__(self, session: httpx.Client) -> None:
        self._session = session

    def goto(self, url: str) -> None:
        self._do("POST", "url", {"url": url})

    @property
    def url(self) -> str:
        return str(self._do("GET", "url"))

    def text(self, css: str = "body") -> str:
        """Return what a person reads there; nothing, if there is no such place."""
        # In one step: between finding an element and reading it, the page may replace it.
        return str(self.run(f"return document.querySelector({json.dumps(css)})?.innerText ?? ''"))

    def sees(self, text: str, css: str = "body") -> None:
        """Wait until a text is to be read there."""
        self.until(lambda: text in self.text(css))

    def type(self, css: str, text: str) -> None:
        """Replace what is in a field."""
        element = self._find(css)
        self._do("POST", f"element/{element}/clear", {})
        self._do("POST", f"element/{element}/value", {"text": text})

    def click(self, css: str) -> None:
        self._do("POST", f"element/{self._find(css)}/click", {})

    def click_link(self, text: str) -> None:
        self._do("POST", f"element/{self._find(text, using='partial link text')}/click", {})

    def press(self, keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._do("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def press_together(self, held: str, key: str) -> None:
        """Press a key while another one is held down."""
        strokes = [("keyDown", held), ("keyDown", key), ("keyUp", key), ("keyUp", held)]
        actions = [{"type": kind, "value": value} for kind, value in strokes]
        self._do("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def resize(self, width: int, height: int) -> None:
        """Give the page a size, also one that is narrower than a window can be."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._do("POST", "goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})

    def run(self, script: str) -> Any:
        return self._do("POST", "execute/sync", {"script": script, "args": []})

    def until(self, is_so: Callable[[], bool], *, page: str | None = None) -> None:
        """Wait for something that this page does by itself, or for what opening ``page`` again shows."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)
            if page is not None:
                # Not a refresh: after a form was sent that would send it again.
                self.goto(page)

    def screenshot(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(base64.b64decode(self._do("GET", "screenshot")))

    def _find(self, selector: str, using: str = "css selector") -> str:
        return str(self._do("POST", "element", {"using": using, "value": selector})[_ELEMENT])

    def _do(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._session.request(method, path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start a browser; it is gone when the block is left."""
    assert CHROMEDRIVER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver, port = _start_driver()
        try:
            driver_url = f"http://127.0.0.1:{port}"
            options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            started = httpx.post(f"{driver_url}/session", json=wanted, timeout=PATIENCE_SECONDS).json()[
                "value"
            ]
            assert "sessionId" in started, started
            session_url = f"{driver_url}/session/{started['sessionId']}"
            try:
                with httpx.Client(base_url=session_url, timeout=PATIENCE_SECONDS) as session:
                    yield Browser(session)
            finally:
                httpx.delete(session_url, timeout=PATIENCE_SECONDS)  # Closes the browser.
        finally:
            driver.terminate()
            driver.wait(PATIENCE_SECONDS)
            if driver.stdout is not None:
                driver.stdout.close()


def _start_driver(tries: int = 3) -> tuple[subprocess.Popen[str], int]:
    """Start chromedriver on a free port. It finds one for IPv4, and gives up if that is in use for IPv6."""
    for _ in range(tries):
        driver = subprocess.Popen(
            [str(CHROMEDRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert driver.stdout is not None
        for line in driver.stdout:
            found = re.search(r"started successfully on port (\d+)", line)
            if found:
                return driver, int(found[1])
        driver.stdout.close()
        driver.wait()
    raise AssertionError("chromedriver did not start")
