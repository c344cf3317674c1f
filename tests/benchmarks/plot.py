"""Draws a bar chart as SVG without a library."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTH, BAR, GAP, TEXT = 720, 26, 12, 240


def bars(values: Mapping[str, float], unit: str = "follow-ups/s") -> str:
    """Return a bar chart of the values, the largest first."""
    ordered = sorted(values.items(), key=lambda one: -one[1])
    scale = (WIDTH - TEXT - 110) / max(values.values())
    lines = []
    for number, (name, value) in enumerate(ordered):
        y = GAP + number * (BAR + GAP)
        lines += [
            f'<text x="{TEXT - 10}" y="{y + 18}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{TEXT}" y="{y}" width="{max(1.0, value * scale):.1f}" height="{BAR}" fill="#3b82f6"/>',
            f'<text x="{TEXT + value * scale + 8:.1f}" y="{y + 18}">{value:,.0f} {unit}</text>',
        ]
    height = GAP + len(ordered) * (BAR + GAP)
    style = "font-family='sans-serif' font-size='14' fill='#64748b'"
    body = "\n".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {style}>\n{body}\n</svg>\n'
