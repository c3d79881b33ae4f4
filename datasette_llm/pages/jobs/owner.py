"""Who owns the jobs of a server: they outlive the request that started them, and end before the server does.

Since 1.0a40 Datasette owns background tasks. For an older one it is the server's lifespan: a task group that
opens when the server starts and is left when it stops. A Datasette without either cannot run jobs; one that
is asked without a server, say.
"""

from __future__ import annotations

from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from anyio.abc import TaskGroup

#: Of the Datasettes that own no tasks: what does it for them while they are served.
_served: WeakKeyDictionary[Any, TaskGroup] = WeakKeyDictionary()


def owns_tasks(datasette: Any) -> bool:
    """Say whether Datasette itself can own a task: since 1.0a40."""
    return hasattr(datasette, "add_background_task")


def is_possible(datasette: Any) -> bool:
    """Say whether there is somebody to own a job."""
    return owns_tasks(datasette) or datasette in _served


def start_task(datasette: Any, function: Callable[[Any], Coroutine[Any, Any, None]], name: str) -> None:
    """Start a task that belongs to the server, in a context of its own: the request's must not outlive it.

    Args:
        function: is called with the Datasette; must not raise.
        name: for whoever lists tasks.
    """
    if owns_tasks(datasette):
        Context().run(datasette.add_background_task, function, name=name)
    else:
        Context().run(lambda: _served[datasette].start_soon(function, datasette, name=name))


def with_lifespan(datasette: Any, app: Any, end: Callable[[], Awaitable[None]]) -> Any:
    """Return an ASGI application whose lifespan owns the tasks of a Datasette that cannot.

    Args:
        app: Datasette's own.
        end: is awaited when the server stops, before Datasette hears of it.
    """

    async def owning(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        import anyio

        async def received() -> Any:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await end()
            return message

        async with anyio.create_task_group() as tasks:
            _served[datasette] = tasks
            try:
                await app(scope, received, send)
            finally:
                del _served[datasette]
                tasks.cancel_scope.cancel()

    return owning
