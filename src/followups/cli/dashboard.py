"""The live view of ``followups stats --watch``."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from followups.cli.times import span

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console, RenderableType

    from followups.cli.stats import Stats

SECONDS = 60
"""Seconds of sending history in the sparkline."""

BARS = " ▁▂▃▄▅▆▇█"
STALE_TICK = timedelta(seconds=30)
ASK_WORKERS = 5.0
"""Seconds between two surveys of the workers: each of them has to answer."""


@dataclass
class Workers:
    """The workers that answer, surveyed in a thread: an answer takes a second, and importing Celery takes as long."""

    said: str = "asking"
    ok: bool = True
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start surveying."""
        threading.Thread(target=self._run, name="workers", daemon=True).start()

    def stop(self) -> None:
        """Stop surveying."""
        self._stop.set()

    def _run(self) -> None:
        from followups.cli.doctor import processes  # noqa: PLC0415 - loads much that only this thread needs

        while not self._stop.is_set():
            found = processes.of_the_broker()
            self.said, self.ok = found.detail, found.ok
            self._stop.wait(ASK_WORKERS)


@dataclass
class Attempts:
    """Outcomes of attempts: since the first look, and per second."""

    first: Mapping[str, int] = field(default_factory=dict)
    last: Mapping[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    at: float = 0.0

    def see(self, attempts: Mapping[str, int], now: float) -> None:
        """Record the totals of a moment ``now``, in seconds."""
        if not self.at:
            self.first = attempts
        elif now > self.at:
            self.rates = {
                name: (number - self.last.get(name, 0)) / (now - self.at) for name, number in attempts.items()
            }
        self.last, self.at = attempts, now

    def table(self) -> Table:
        """Return a table with a row for each outcome seen so far."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(justify="right", style="bold")
        table.add_column(justify="right")
        table.add_row(Text("attempts"), Text("since then", style="dim"), Text("a second", style="dim"))
        for name in sorted(self.last):
            number = self.last[name] - self.first.get(name, 0)
            style = "" if name == "sent" or not number else "yellow"
            table.add_row(name, Text(f"{number:,}", style=style), f"{self.rates.get(name, 0.0):,.1f}")
        return table


def sparkline(numbers: Sequence[int]) -> str:
    """Return numbers as bars, the highest of them full.

    >>> sparkline([0, 1, 2, 4, 8])
    ' ▁▂▄█'
    """
    highest = max(numbers, default=0)
    # Every value above zero gets a visible bar.
    return "".join(BARS[0 if not number else max(1, number * 8 // highest)] for number in numbers)


def watch(target: Console, look: Callable[[], Stats], draw: Callable[[Stats], Table], interval: float) -> None:
    """Refresh the screen until Ctrl-C, which is raised; ``draw`` renders the table of counts."""
    workers, attempts = Workers(), Attempts()
    workers.start()
    try:
        with Live(console=target, auto_refresh=False) as live:
            while True:
                found = look()
                attempts.see(found.attempts, time.monotonic())
                live.update(view(found, draw(found), attempts, workers), refresh=True)
                time.sleep(interval)
    finally:
        workers.stop()


def view(look: Stats, counts: Table, attempts: Attempts, workers: Workers) -> RenderableType:
    """Return the whole screen."""
    top = Table.grid(padding=(0, 1), expand=True)
    top.add_column(ratio=3)
    top.add_column(ratio=2)
    top.add_row(
        Panel(counts, title="follow-ups", title_align="left"),
        Panel(Group(attempts.table(), Text(), _processes(look, workers)), title="work", title_align="left"),
    )
    return Group(top, Panel(_throughput(look), title="sent a second, the last minute", title_align="left"))


def _processes(look: Stats, workers: Workers) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    late = look.tick_age is None or look.tick_age > STALE_TICK
    age = "never" if look.tick_age is None else f"{span(look.tick_age)} ago"
    grid.add_row("last tick", Text(age, style="red" if late else ""))
    grid.add_row("workers", Text(workers.said, style="" if workers.ok else "red"))
    return grid


def _throughput(look: Stats) -> Text:
    if look.per_second is None:
        return Text("not measured: it took too long", style="dim")
    highest = max(look.per_second, default=0)
    return Text.assemble((sparkline(look.per_second), "cyan"), f"  now {look.per_second[-1]:,}, at most {highest:,}")
