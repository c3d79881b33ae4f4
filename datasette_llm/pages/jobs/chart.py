"""How a job went over time: rows a second and dollars, in few points however long it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

#: More points than this, and every other one goes.
POINTS = 120
WIDTH = 600
HEIGHT = 80


@dataclass(slots=True)
class History:
    """What a job had done at moments of its life, about evenly spread.

    Attributes:
        points: seconds since its begin, rows done, dollars spent.
    """

    points: list[tuple[float, int, float]] = field(default_factory=lambda: [(0.0, 0, 0.0)])
    _step: float = 1.0

    def add(self, seconds: float, rows: int, cost: float) -> None:
        """Note a moment, if the one before is long enough ago."""
        if seconds < self.points[-1][0] + self._step:
            return
        self.points.append((seconds, rows, cost))
        if len(self.points) > POINTS:
            del self.points[1::2]
            self._step *= 2

    @property
    def rate(self) -> float | None:
        """The rows a second of the last moments."""
        if len(self.points) < 2:
            return None
        (before, rows, _), (now, more, _) = self.points[max(-6, -len(self.points))], self.points[-1]
        return (more - rows) / (now - before)


@dataclass(frozen=True, slots=True)
class Chart:
    """Two lines as SVG draws them, and what they end at.

    Attributes:
        rates: points of the line of rows a second.
        costs: points of the line of dollars; empty where nothing has cost anything.
        highest_rate: what the top of the chart is.
        seconds: what its width is.
    """

    rates: str
    costs: str
    highest_rate: float
    seconds: float


def draw(history: History) -> Chart | None:
    """Return the chart of a job, or ``None`` while there is too little to show."""
    points = history.points
    if len(points) < 3:
        return None
    seconds = points[-1][0]
    rates = [(now, (rows - before) / (now - then)) for (then, before, _), (now, rows, _) in pairwise(points)]
    highest = max(rate for _, rate in rates)
    most = points[-1][2]
    return Chart(
        rates=_line(rates, seconds, highest),
        costs=_line([(now, cost) for now, _, cost in points], seconds, most) if most else "",
        highest_rate=highest,
        seconds=seconds,
    )


def _line(points: list[tuple[float, float]], width: float, height: float) -> str:
    return " ".join(
        f"{WIDTH * x / width:.1f},{HEIGHT - (HEIGHT - 4) * y / (height or 1) - 2:.1f}" for x, y in points
    )
