"""The groups that are open on this event loop, for whoever shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio.lowlevel import RunVar

if TYPE_CHECKING:
    from .group_supervisor import GroupSupervisor

_live: RunVar[dict[GroupSupervisor, None]] = RunVar("datasette_llm_live_groups")


def entered(supervisor: GroupSupervisor) -> None:
    """The block of a group is entered."""
    live = _live.get(None)
    if live is None:
        live = {}
        _live.set(live)
    live[supervisor] = None


def left(supervisor: GroupSupervisor) -> None:
    """The block of a group is left. Idempotent."""
    live = _live.get(None)
    if live is not None:
        live.pop(supervisor, None)


def live_groups() -> list[GroupSupervisor]:
    """Return the groups whose blocks are open, the one that was opened first at the beginning."""
    return list(_live.get(None) or ())
