"""Who makes the model calls of the groups that run now, if it is not this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...calls.remote.fleet import Figures
    from ...tasks.group_supervisor import GroupSupervisor


def read_workers(groups: Iterable[GroupSupervisor]) -> list[dict[str, Any]]:
    """Return the workers that are or were there, each once however many groups share it; busy ones first."""
    seen: dict[str, dict[str, Any]] = {}
    for group in groups:
        figures = group.clients.figures
        if figures is None:
            continue
        for worker in {**figures.prompts, **figures.workers}:
            in_flight = figures.workers.get(worker)
            seen[worker] = {
                "worker": worker,
                "is": "gone" if in_flight is None else "there",
                "in_flight": in_flight or 0,
                "prompts": figures.prompts.get(worker, 0),
            }
    return sorted(seen.values(), key=lambda row: (row["is"] == "gone", -row["in_flight"], row["worker"]))


def in_words(figures: Figures | None) -> str:
    """Say who makes a group's calls."""
    if figures is None:
        return "this process"
    words = [f"{len(figures.workers)} worker{'' if len(figures.workers) == 1 else 's'}"]
    if figures.waiting:
        words.append(f"{figures.waiting:,} calls wait for one")
    if figures.deaths:
        words.append(f"{figures.deaths:,} lost")
    return ", ".join(words)
