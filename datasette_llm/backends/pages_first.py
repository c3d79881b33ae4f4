"""Pages go first: what a server does in bulk lets them be made, as both need the same interpreter.

A page takes many turns of the event loop, and with a few hundred answers a second each turn is long. So while
a page is being made a job starts nothing new; what is in flight already goes on.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable

#: How often it is looked whether a page is still being made, in seconds.
LOOK_SECONDS = 0.005
#: A page that takes longer waits for something, a model's answer say, and not for the interpreter.
PAGE_SECONDS = 1.0
#: However many pages there are, a job goes on after this time, and for this share of it.
GIVE_WAY_SECONDS, UNDISTURBED = 0.5, 0.5


class PagesFirst:
    """The pages that one process is making. May be asked from any thread and event loop.

    Args:
        clock: the seconds that pages are measured by.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: dict[object, float] = {}

    def begin(self, page: object) -> None:
        """A page is being made from now on."""
        self._begun[page] = self._clock()

    def end(self, page: object) -> None:
        """It is made, or given up; may be said again."""
        self._begun.pop(page, None)

    def are_busy(self) -> bool:
        """Whether a page is being made."""
        if not self._begun:
            return False
        since = self._clock() - PAGE_SECONDS
        return any(begun > since for begun in list(self._begun.values()))


#: Those of this process.
pages_first = PagesFirst()

#: The page that a task is making.
_own_page: ContextVar[object] = ContextVar("datasette_llm page")


class GivingWay:
    """One job that gives way to pages.

    Args:
        pages: the pages; those of this process unless a test has others.
    """

    def __init__(self, pages: PagesFirst | None = None) -> None:
        self._pages = pages or pages_first
        self._undisturbed_until = 0.0
        # A page that runs a job itself waits for it.
        self._pages.end(_own_page.get(None))

    async def wait(self) -> None:
        """Wait while a page is being made: for half a second at most, and then not for a while."""
        if not self._pages.are_busy():
            return
        began = now = anyio.current_time()
        if began < self._undisturbed_until:
            return
        while self._pages.are_busy() and now - began < GIVE_WAY_SECONDS:
            await anyio.sleep(LOOK_SECONDS)
            now = anyio.current_time()
        self._undisturbed_until = now + UNDISTURBED * (now - began)


def watching_pages(app: Any, pages: PagesFirst = pages_first) -> Any:
    """Return an ASGI application that says which pages are being made.

    Args:
        app: the application that makes them.
        pages: who is told. A response that has begun is one no more: a stream of events may last for hours.
    """

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        page = object()

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                pages.end(page)
            await send(message)

        pages.begin(page)
        token = _own_page.set(page)
        try:
            await app(scope, receive, sent)
        finally:
            _own_page.reset(token)
            pages.end(page)

    return watched
