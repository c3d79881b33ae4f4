"""The addresses under ``/-/llm``, and who may ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasette.utils.asgi import Forbidden, Response

from . import PERMISSION

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: How often the page asks for news, in seconds.
INTERVAL = 2


def routes() -> list[tuple[str, Callable[..., Awaitable[Any]]]]:
    """Return the routes of the server's state."""
    return [(r"^/-/llm$", _page), (r"^/-/llm\.json$", _json), (r"^/-/llm/test$", _test)]


async def may_see(datasette: Any, actor: dict[str, Any] | None) -> bool:
    """Say whether somebody may see the server's state."""
    return bool(await datasette.allowed(action=PERMISSION, actor=actor))


async def _check(datasette: Any, request: Any) -> None:
    if not await may_see(datasette, request.actor):
        raise Forbidden(f"The state of language models takes the permission {PERMISSION}")


async def _page(datasette: Any, request: Any) -> Any:
    await _check(datasette, request)
    return await _rendered(datasette, request)


async def _json(datasette: Any, request: Any) -> Any:
    """Answer with all that the page shows; with ``?live=1`` only with what changes from moment to moment."""
    await _check(datasette, request)
    answer = {"ok": True, **await _live(datasette, request.actor)}
    if not request.args.get("live"):
        from .models import read_models

        answer |= await read_models(datasette, request.actor)
    return _private(Response.json(answer))


async def _test(datasette: Any, request: Any) -> Any:
    await _check(datasette, request)
    if request.method != "POST":
        return Response.text("Send the form of /-/llm", status=405, headers={"allow": "POST"})
    from .trial import send_test_prompt

    # "model:gpt-4o-mini", or "purpose:enrichments" for its default; nothing is the default without one.
    kind, _, name = ((await request.post_vars()).get("target") or "").partition(":")
    result = await send_test_prompt(
        datasette,
        request.actor,
        model_id=name if kind == "model" else None,
        purpose=name if kind == "purpose" else None,
    )
    if "application/json" in (request.headers.get("accept") or ""):
        return _private(Response.json(result))
    return await _rendered(datasette, request, result=result, target=f"{kind}:{name}")


async def _rendered(datasette: Any, request: Any, **context: Any) -> Any:
    from .chart import bars
    from .models import read_models

    live = await _live(datasette, request.actor)
    models = await read_models(datasette, request.actor)
    page = await datasette.render_template(
        "llm_status.html",
        {"live": live, "chart": bars(live["minutes"]), "interval": INTERVAL, **models, **context},
        request=request,
    )
    return _private(Response.html(page))


async def _live(datasette: Any, actor: dict[str, Any] | None) -> dict[str, Any]:
    from .jobs import read_jobs
    from .live import latest

    return {**await read_jobs(datasette, actor), **latest(datasette)}


def _private(response: Any) -> Any:
    response.headers["cache-control"] = "private, no-store"
    return response
