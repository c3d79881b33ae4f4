"""The addresses of jobs, and what answers there: light, since every server asks for it when it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_JOBS = r"^/(?P<database>[^/]+)/-/llm/jobs"
_JOB = _JOBS + r"/(?P<number>[0-9]{1,15})"


def routes() -> list[tuple[str, Callable[..., Awaitable[Any]]]]:
    """Return the routes of jobs in the browser."""
    return [
        (_JOBS + r"(?P<json>\.json)?$", _list),
        (_JOB + r"(?P<json>\.json)?$", _job),
        (_JOB + r"/events$", _events),
        (_JOB + r"/(?P<action>pause|resume|cancel|go-on|retry|stale)$", _act),
        (r"^/(?P<database>[^/]+)/-/llm/enrich/(?P<table>[^/]+)$", _form),
    ]


async def _list(datasette: Any, request: Any) -> Any:
    from .views import list_page

    return await list_page(datasette, request)


async def _job(datasette: Any, request: Any) -> Any:
    from .views import job_page

    return await job_page(datasette, request)


async def _events(datasette: Any, request: Any) -> Any:
    from .events import events

    return await events(datasette, request)


async def _act(datasette: Any, request: Any) -> Any:
    from .views import act

    return await act(datasette, request)


async def _form(datasette: Any, request: Any) -> Any:
    from .loading import load_form

    return await (await load_form()).form_page(datasette, request)
