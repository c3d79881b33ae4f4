"""The last hour as bars, one a minute: how high each part of them is."""

from __future__ import annotations

from typing import Any

#: The parts of a bar, from the bottom up.
PARTS = ("answered", "refused", "failed")
#: How high the highest bar is drawn.
HEIGHT = 100.0


def bars(minutes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what to draw: the most calls in a minute, and for each minute its parts from the bottom up."""
    most = max((sum(minute[part] for part in PARTS) for minute in minutes), default=0)
    drawn = []
    for x, minute in enumerate(minutes):
        y, parts = HEIGHT, []
        for part in PARTS:
            height = HEIGHT * minute[part] / most if most else 0.0
            y -= height
            parts.append({"part": part, "x": x, "y": round(y, 2), "height": round(height, 2)})
        drawn.append(parts)
    return {"most": most, "minutes": drawn}
