"""The chart: wall time of every way as a multiple of the ideal, as an SVG that needs no other file."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .report import Outcome

WIDTH, LEFT, RIGHT = 860, 260, 90
BAR, GAP, SECTION = 16, 6, 34
# Plain llm is many times slower than the rest: bars beyond this are cut, and say their figure.
LARGEST = 4.0
NOTE = f"dashed: the ideal, where only the provider takes time; bars are cut at {LARGEST:g}"

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .title { font-size: 17px; font-weight: 600 } .section { font-weight: 600 } .note { fill: #57606a }
  .ours { fill: #1f6feb } .other { fill: #9aa4af } .ideal { stroke: #24292f; stroke-dasharray: 3 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .note { fill: #9198a1 } .ours { fill: #58a6ff } .other { fill: #6e7681 }
    .ideal { stroke: #e6edf3 }
  }
"""


def write_chart(outcomes: list[Outcome], path: Path) -> None:
    """Draw one bar for each way of each scenario that has an ideal, both backends side by side."""
    path.write_text(chart(outcomes), encoding="utf-8")


def chart(outcomes: list[Outcome]) -> str:
    """Return the SVG."""
    sections: dict[str, list[tuple[str, float, bool]]] = {}
    for outcome in outcomes:
        for label, result in outcome.results.items():
            times = outcome.scenario.times_ideal(label, result)
            if times:
                heading = f"{outcome.scenario.name}: {outcome.scenario.title}"
                ours = label.startswith(("map", "prompt"))
                sections.setdefault(heading, []).append((f"{label} ({outcome.backend})", times, ours))

    scale = (WIDTH - LEFT - RIGHT) / LARGEST
    drawn = []
    y = 62
    for heading, bars in sections.items():
        y += SECTION
        drawn.append(f'<text class="section" x="12" y="{y - 10}">{escape(heading)}</text>')
        top = y
        for label, times, ours in sorted(bars, key=lambda bar: (not bar[2], bar[0])):
            width = min(times, LARGEST) * scale
            figure = f"{times:.2f}" + (" →" if times > LARGEST else "")
            drawn += [
                f'<text x="{LEFT - 10}" y="{y + 13}" text-anchor="end">{escape(label)}</text>',
                _bar("ours" if ours else "other", y, width),
                # Beside the bar, and beside the dashed line where the bar ends before it.
                f'<text x="{LEFT + max(width, scale) + 6:.1f}" y="{y + 13}">{figure}</text>',
            ]
            y += BAR + GAP
        ideal = LEFT + scale
        drawn.append(f'<line class="ideal" x1="{ideal:.1f}" x2="{ideal:.1f}" y1="{top - 4}" y2="{y - 2}"/>')
    height = y + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<style>{STYLE}</style>",
        '<text class="title" x="12" y="28">Wall time as a multiple of the ideal</text>',
        f'<text class="note" x="12" y="50">{NOTE}</text>',
    )
    return "\n".join((*head, *drawn, "</svg>\n"))


def _bar(kind: str, y: int, width: float) -> str:
    return f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>'
