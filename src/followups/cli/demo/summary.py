"""The demo's summary: what happened, and what to try next. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from followups.cli.demo.scenario import REFUSED, REPLYING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from followups.cli.demo.score import Score

NEXT = (
    ("followups up", "the same, to stay: an API to call, and a chat page"),
    ("", "to watch, to write back and to break things on"),
    ("followups stats --watch", "looks at it from another terminal"),
)


def facts(score: Score) -> list[tuple[str, str]]:
    """Return the figures of the run, each with its meaning."""
    lag = score.lag
    return [
        (f"{score.sent} sent", "each at its own moment, through web, beat, broker and worker"),
        (f"{score.retried} retried", "the receiver answered 500; the next try waited in the database"),
        (f"{score.failed} failed", f"the receiver refused {REFUSED}'s with 403: not tried again"),
        (f"{score.cancelled} cancelled", f"{REPLYING} wrote back before they were due"),
        (f"{score.duplicates} duplicates", "counted by the receiver"),
        (
            "lag",
            f"p50 {_number(lag['p50'])}  p95 {_number(lag['p95'])}  p99 {_number(lag['p99'])} ms (first attempts)",
        ),
    ]


def panel(score: Score) -> RenderableType:
    """Return the summary for a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    for fact in facts(score):
        table.add_row(*fact)
    onward = Table.grid(padding=(0, 2))
    onward.add_column(style="bold cyan", no_wrap=True)
    for line in NEXT:
        onward.add_row(*line)
    parts: list[RenderableType] = [table, "", onward]
    if score.problems:
        parts = [table, "", *(Text(f"Not as scripted: {problem}", style="red") for problem in score.problems)]
    title = "[bold green]All as scripted" if score.ok else "[bold red]Not as scripted"
    return Panel(Group(*parts), title=title, title_align="left", border_style="green" if score.ok else "red")


def lines(score: Score) -> Sequence[str]:
    """Return the summary for a pipe."""
    said = [f"{name}: {meaning}" for name, meaning in facts(score)]
    said += [f"Not as scripted: {problem}" for problem in score.problems]
    return [*said, "All as scripted. Next: followups up" if score.ok else "Not all as scripted."]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
