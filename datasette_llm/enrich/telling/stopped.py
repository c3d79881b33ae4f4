"""Why a job ended before its last row, and what a person can do about it."""

from __future__ import annotations

import time
from typing import Literal, get_args

#: Reasons that lie with the provider: no other row could have been answered.
RefusedReason = Literal["key_refused", "no_money", "no_model", "quota", "refused_alike", "unreachable"]

StopReason = Literal[
    RefusedReason,
    "database",
    "deadline",
    "failing",
    "max_failures",
    "max_cost",
    "max_tokens_total",
    "SIGINT",
    "SIGTERM",
    "stopped",
]

REFUSED_REASONS: tuple[RefusedReason, ...] = get_args(RefusedReason)

STOPPED: dict[StopReason, str] = {
    "database": "the database could not be used",
    "deadline": "the deadline has passed",
    "failing": "a hundred prompts in a row failed; --max-failures N allows N failures",
    "key_refused": "the API key is refused",
    "no_money": "the account has no money left",
    "no_model": "the provider has no such model for this key",
    "quota": "the quota is used up",
    "refused_alike": "the provider refused the first rows all alike",
    "unreachable": "the provider cannot be reached",
    "max_failures": "too many rows failed",
    "max_cost": "the limit to the cost is reached",
    "max_tokens_total": "the tokens are spent",
    "SIGINT": "interrupted",
    "SIGTERM": "terminated",
    "stopped": "stopped",
}

_REMEDIES: dict[RefusedReason, str] = {
    "key_refused": "Give another key with --key, or store one: llm keys set NAME",
    "no_money": "Add credit at the provider, or use another key: --key KEY",
    "no_model": "Choose another model with --model, or see at the provider what this key may use",
    "quota": "Go on when it is back, or let the job wait for that: --wait-for-quota {wait}",
    "refused_alike": (
        "Mend what it says. If it is about the rows themselves: --max-failures N goes on past N of them"
    ),
    "unreachable": (
        "Is it running, is the address right, and is there a network? Go on when it is back, or let the job "
        "wait longer: --outage-timeout DURATION"
    ),
}

#: More of what a provider says is not shown.
CHARACTERS = 400


def sentence(reason: StopReason, quota_seconds: float | None = None) -> str:
    """Return why a job was stopped, for people."""
    until = "" if quota_seconds is None else f" until {clock_time(quota_seconds)}"
    return STOPPED[reason] + until


def advice(reason: RefusedReason, refusal: str | None, quota_seconds: float | None = None) -> list[str]:
    """Return what the provider said and what to do about it, as lines for people."""
    lines = []
    if refusal:
        shown = " ".join(refusal.split())
        said = "What happened" if reason == "unreachable" else "It says"
        lines.append(f"  {said}: {shown if len(shown) <= CHARACTERS else shown[:CHARACTERS] + '...'}")
    lines.append(f"  {_REMEDIES[reason].format(wait=_as_option(quota_seconds))}")
    lines.append("  The rows that it concerns are not recorded as failed")
    return lines


def clock_time(seconds: float) -> str:
    """Return the time of day in so many seconds, with the date where it is not today."""
    then, now = time.localtime(time.time() + seconds), time.localtime()
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%b %d, %H:%M", then)


def _as_option(seconds: float | None) -> str:
    """Return a duration that the option takes, and that is long enough."""
    if seconds is None:
        return "24h"
    hours, rest = divmod(int(seconds) + 60, 3_600)
    return f"{hours}h{rest // 60}m" if hours else f"{rest // 60 + 1}m"
