"""What runs on this event loop now, and what the last hour brought, as plain data.

Each reading is bounded: so many lanes and groups are told, however many there are. It reads what is kept
anyway, so that a page that is open in many browsers costs jobs nothing.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import anyio
from anyio.lowlevel import RunVar

from ...pace.registry import throttles_here
from ...pace.state import state_of
from ...pace.tally import MINUTES, Tally
from ...secrecy import redacted
from ...tasks.live import live_groups
from .workers import in_words, read_workers

if TYPE_CHECKING:
    from datasette.app import Datasette

    from ...pace.throttle import Throttle
    from ...tasks.group_supervisor import GroupSupervisor

#: So many lanes and groups are told.
MOST = 50
#: Those who ask often get what somebody else was told in this time.
KEPT_SECONDS = 1.0
#: What stands for the name of a key where a model needs none.
NO_KEY = "no key"


_latest: RunVar[WeakKeyDictionary[Datasette, tuple[float, dict[str, Any]]]] = RunVar("datasette_llm_status")


def latest(datasette: Datasette) -> dict[str, Any]:
    """Return how things stood within the last second: the same for all who ask, and not to be changed."""
    kept = _latest.get(None)
    if kept is None:
        kept = WeakKeyDictionary()
        _latest.set(kept)
    now = anyio.current_time()
    known = kept.get(datasette)
    if known is None or now - known[0] >= KEPT_SECONDS:
        known = kept[datasette] = (now, read_live(datasette))
    return known[1]


def read_live(datasette: Datasette) -> dict[str, Any]:
    """Return how things stand now."""
    generated_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    # Those that are busy first, then those that were used last.
    throttles = throttles_here()[::-1]
    throttles.sort(key=lambda throttle: throttle.in_use + throttle.waiting, reverse=True)
    groups = [group for group in live_groups() if group.datasette is datasette]
    total = Tally()
    minutes = [Tally() for _ in range(MINUTES)]
    for throttle in throttles:
        for ago, tally in throttle.hour.minutes().items():
            minutes[ago].add(tally)
            total.add(tally)
    return {
        "generated_at": generated_at,
        "lanes": [_lane(throttle) for throttle in throttles[:MOST]],
        "lanes_not_shown": max(0, len(throttles) - MOST),
        "groups": [_group(group) for group in groups[:MOST]],
        "groups_not_shown": max(0, len(groups) - MOST),
        "workers": read_workers(groups)[:MOST],
        "hour": _figures(total),
        "minutes": [
            {
                "minutes_ago": ago,
                "answered": tally.answered,
                "refused": tally.refused,
                "failed": tally.failed + tally.cancelled,
            }
            for ago, tally in reversed(list(enumerate(minutes)))
        ],
    }


def _lane(throttle: Throttle) -> dict[str, Any]:
    state = state_of(throttle)
    away = state.away
    return {
        "model": throttle.model_id,
        "key": throttle.key_name or NO_KEY,
        "state": state.condition,
        "limit": state.limit,
        "in_flight": state.in_flight,
        "waiting": state.waiting,
        "cooldown_seconds": round(state.cooldown_seconds, 1),
        "rates": {source: round(rate, 2) for source, rate in state.rates.items()},
        "away": None
        if away is None
        else {
            "address": away.address,
            "what": redacted(away.what),
            "seconds": round(away.seconds, 1),
            "next_try": round(away.next_try, 1),
        },
        "hour": _figures(throttle.hour.total()),
    }


def _figures(tally: Tally) -> dict[str, Any]:
    figures = asdict(tally)
    cost = figures["cost"] if figures.pop("priced") else None
    return {"requests": tally.requests, **figures, "cost": _dollars(cost, tally.unpriced)}


def _dollars(cost: float | None, unpriced: int) -> float | None:
    """Return what is known of a cost; nothing at all is known to have cost nothing."""
    return None if cost is None and unpriced else round(cost or 0.0, 6)


def _group(supervisor: GroupSupervisor) -> dict[str, Any]:
    stats = supervisor.group.stats
    actor = supervisor.group.actor or {}
    return {
        "model": supervisor.group.model_id,
        "purpose": supervisor.group.purpose,
        "actor": None if actor.get("id") is None else str(actor["id"]),
        "concurrency": stats.concurrency,
        "running": stats.running,
        "waiting": stats.waiting,
        "succeeded": stats.succeeded,
        "failed": stats.failed,
        "cancelled": stats.cancelled,
        "retries": stats.retries,
        "prompts_per_second": round(stats.prompts_per_second, 2),
        "input_tokens": stats.input_tokens,
        "output_tokens": stats.output_tokens,
        "cost": _dollars(stats.cost, stats.unpriced),
        "elapsed_seconds": round(stats.elapsed, 1),
        "calls_made_by": in_words(stats.workers),
    }
