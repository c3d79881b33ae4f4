"""axe-core, which says what keeps people from using a page: from its own package, not from here.

``npm install axe-core``, with ``AXE_CORE`` for the path of its ``axe.min.js``. Without it tests skip, but not
in CI.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .browser import Browser

_SCRIPT = Path(os.environ.get("AXE_CORE") or "node_modules/axe-core/axe.min.js")

needs_axe = pytest.mark.skipif(
    not (_SCRIPT.is_file() or os.environ.get("CI")),
    reason="no axe-core: npm install axe-core, and set AXE_CORE",
)


def violations(browser: Browser, within: str = "html") -> list[str]:
    """Return what is wrong with the page that the browser shows, with the element that it is wrong with.

    Args:
        within: the part of it that is looked at, as a CSS selector.
    """
    browser.run(_SCRIPT.read_text(encoding="utf-8"))
    browser.run(
        "window.axeFound = null; axe.run("
        + json.dumps(within)
        + ").then(found => { window.axeFound = found.violations })"
    )
    browser.until(lambda: bool(browser.run("return window.axeFound !== null")))
    return [
        f"{violation['id']}: {node['html'][:200]}"
        for violation in browser.run("return window.axeFound")
        for node in violation["nodes"]
    ]
