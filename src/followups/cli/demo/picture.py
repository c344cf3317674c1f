"""The demo's live picture: chats on the left, current follow-ups on the right. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from followups.cli.demo.score import lags
from followups.states import Status, code_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from followups.cli.demo.score import FollowUpState

WIDE = 110
"""Minimum terminal width at which the picture includes the messages."""
FRAME_LINES = 8
"""Number of lines that are not rows: title, bar, borders, headings, totals and cursor."""
LEAST_ROWS = 6
NARROW = 76
"""Minimum terminal width at which the chats fit next to the follow-ups."""
CHATS_WIDTH = 22
STATE_WIDTH = 23
PAST_SHARE = 0.6
"""Share of the table's rows that show past follow-ups; the others show upcoming follow-ups."""

STYLES = {Status.SENT: "green", Status.FAILED: "red", Status.CANCELLED: "yellow", Status.PENDING: "dim"}
MARKS = {Status.SENT: "●", Status.FAILED: "✗", Status.CANCELLED: "⊘", Status.PENDING: "○"}
RETRYING = "↻"


@dataclass(frozen=True, slots=True)
class Picture:
    """The data that the demo's picture shows."""

    standings: Sequence[FollowUpState]
    now: datetime
    sandbox: str
    width: int
    height: int

    def render(self) -> RenderableType:
        """Return the whole picture as text."""
        columns = Table.grid(expand=True)
        rows = max(self.height - FRAME_LINES, LEAST_ROWS)
        panels = [self._follow_ups(rows)]
        if self.width >= NARROW:
            columns.add_column(width=CHATS_WIDTH)
            panels.insert(0, _chats(self.standings, rows))
        columns.add_column(ratio=1)
        columns.add_row(*panels)
        return Group(self._title(), self._bar(), columns, _totals(self.standings))

    def _title(self) -> Text:
        title = Text.assemble(("followups demo", "bold"), "  sandbox page ", (self.sandbox, "cyan"), no_wrap=True)
        return title if len(title) <= self.width else Text("followups demo", style="bold")

    def _bar(self) -> RenderableType:
        ended = sum(each.ended for each in self.standings)
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        total = len(self.standings)
        bar.add_row(ProgressBar(total=total, completed=ended, complete_style="green"), f"{ended} of {total} ended")
        return bar

    def _follow_ups(self, rows: int) -> Panel:
        wide = self.width >= WIDE
        table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
        table.add_column("chat", width=4, no_wrap=True)
        table.add_column("due", width=10, justify="right", no_wrap=True)
        table.add_column("state", min_width=STATE_WIDTH, ratio=None if wide else 1, no_wrap=True)
        table.add_column("tries", width=5, justify="right")
        table.add_column("lag ms", width=7, justify="right", no_wrap=True)
        if wide:
            table.add_column("message", ratio=1, no_wrap=True)
        for each in around_now(self.standings, self.now, rows):
            more = (Text(each.scheduled.part.message, style="dim"),) if wide else ()
            table.add_row(*_cells(each, self.now), *more)
        return Panel(table, title="follow-ups, by due moment", title_align="left", border_style="dim")


def around_now(standings: Sequence[FollowUpState], now: datetime, count: int) -> list[FollowUpState]:
    """Return ``count`` follow-ups that are due around now, in the order of their due times.

    Due follow-ups that have not ended are chosen first, for example those awaiting a retry. If all follow-ups have
    ended, those with a retry and those not sent are chosen first.
    """
    if all(each.ended for each in standings):
        ranked = sorted(standings, key=lambda each: each.status == Status.SENT and not each.retried)
        return sorted(ranked[:count], key=lambda each: each.scheduled.due)
    late = [each for each in standings if each.scheduled.due <= now and not each.ended]
    past = [each for each in standings if each.scheduled.due <= now and each.ended]
    coming = [each for each in standings if each.scheduled.due > now]
    room = max(count - len(late), 0)
    shown_past = min(len(past), max(round(room * PAST_SHARE), room - len(coming)))
    chosen = [*late[:count], *past[len(past) - shown_past :], *coming[: room - shown_past]]
    return sorted(chosen, key=lambda each: each.scheduled.due)


def state_of(standing: FollowUpState, now: datetime) -> str:
    """Return the follow-up's state in words that fit the narrowest column."""
    if standing.trying_again and standing.next_attempt_at is not None:
        left = max((standing.next_attempt_at - now).total_seconds(), 0.0)
        return f"{RETRYING} failed, again in {left:.1f}s"
    mark = MARKS[standing.status]
    if standing.reason:
        return f"{mark} {code_of(standing.reason)}"
    return f"{mark} {standing.status}" + (f", try {standing.attempts}" if standing.retried else "")


def _style(standing: FollowUpState) -> str:
    return "magenta" if standing.trying_again else STYLES[standing.status]


def _cells(standing: FollowUpState, now: datetime) -> tuple[Text, ...]:
    left = (standing.scheduled.due - now) / timedelta(seconds=1)
    due = f"in {left:.1f} s" if left > 0 else f"{-left:.1f} s ago"
    lag = "-" if standing.lag is None else f"{standing.lag:,.1f}"
    return (
        Text(standing.chat, style="bold"),
        Text(due, style="" if left > 0 else "dim"),
        Text(state_of(standing, now), style=_style(standing)),
        Text(str(standing.attempts or "-"), style="magenta" if standing.retried else "dim"),
        # The lag of a retried follow-up is not shown, because most of it is the time between two attempts.
        Text(lag, style="magenta" if standing.retried else "cyan"),
    )


def _chats(standings: Sequence[FollowUpState], rows: int) -> Panel:
    by_chat: dict[str, Text] = {}
    for each in standings:
        marks = by_chat.setdefault(each.chat, Text())
        marks.append(f"{RETRYING if each.trying_again else MARKS[each.status]} ", style=_style(each))
    table = Table.grid(padding=(0, 1))
    for name, marks in sorted(by_chat.items()):
        table.add_row(Text(name, style="bold"), marks)
    legend = Text("● sent   ○ pending\n✗ failed ↻ again\n⊘ cancelled", style="dim")
    body = Group(table, "", legend) if rows >= len(by_chat) + FRAME_LINES // 2 else table
    return Panel(body, title="chats", title_align="left", border_style="dim")


def _totals(standings: Sequence[FollowUpState]) -> Text:
    counts = {status: sum(each.status == status for each in standings) for status in Status}
    retried = sum(each.retried for each in standings)
    line = Text(" ", no_wrap=True, overflow="ellipsis")
    for status in (Status.SENT, Status.FAILED, Status.CANCELLED):
        line.append(f"{counts[status]} {status}  ", style=STYLES[status])
    line.append(f"{retried} retried  ", style="magenta")
    for name, value in lags(standings).items():
        line.append(f" {name} ", style="dim").append("-" if value is None else f"{value:.1f}", style="cyan")
    return line.append(" ms late", style="dim")
