"""``followups stats``: counts by state, lag, throughput, attempts, and a live dashboard of them."""

from __future__ import annotations

import json as json_module
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from sqlalchemy import func, select

from followups.cli import connection
from followups.cli.entry import examples
from followups.cli.output import Json, cell, console, print_json
from followups.operations.doctor import process_checks
from followups.operations.explain import STALE_TICK
from followups.settings import get_settings
from followups.store import counts as store
from followups.store import last_tick
from followups.wording import readable, rfc3339, span

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from rich.console import Console, RenderableType
    from sqlalchemy import Engine

    from followups.store.counts import Counts, Pace


DASHBOARD_SECONDS = 60
"""Seconds of sending history in the dashboard."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the system. ``pace`` is None if its measurement took too long."""

    at: datetime
    counts: Counts
    pace: Pace | None
    attempts: Mapping[str, int]
    """The number of all attempts so far, by outcome."""
    tick_age: timedelta | None
    per_second: Sequence[int] | None = None
    """Number of follow-ups sent in each recent second, for the dashboard."""


def measure(engine: Engine, window: timedelta) -> Stats:
    """Return a snapshot, with lag and throughput over the last ``window``."""
    with engine.begin() as opened:
        at = opened.execute(select(func.now())).scalar_one()
        counts = store.count(opened, window=get_settings().max_in_flight)
        return Stats(at, counts, store.pace(opened, window), store.attempts(opened), last_tick.last_tick_age(opened))


def measure_by_second(engine: Engine, window: timedelta) -> Stats:
    """Return a snapshot that counts the follow-ups sent in each of the last `DASHBOARD_SECONDS` seconds."""
    look = measure(engine, window)
    with engine.begin() as opened:
        return replace(look, per_second=store.per_second(opened, DASHBOARD_SECONDS))


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

MILLISECOND = timedelta(milliseconds=1)
BARS = " ▁▂▃▄▅▆▇█"
ASK_WORKERS = 5.0
"""Seconds between two queries to the workers, since every worker has to answer each query."""


@app.command(
    epilog=examples("followups stats", "followups stats --watch", "followups stats --minutes 60 --json"),
)
def stats(
    *,
    minutes: Annotated[
        float, typer.Option(min=0.1, max=10_080, help="The last minutes, for which lag and throughput are shown.")
    ] = 5,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between refreshes of --watch.")] = 2,
    json: Json = False,
) -> None:
    """Count follow-ups by state, and show how late and at what rate they were sent.

    Lag is the time of acceptance minus the due date. It includes the time spent on retries and waiting for rate limits,
    and is large if the due date was already past at creation. The count of pending follow-ups is exact. The count of
    each final state is exact up to 100,000; larger counts are estimates, marked with a tilde.

    With --watch on a terminal, the output is a live dashboard. The dashboard also shows the sends per second, the
    outcomes of attempts, the workers that reply to queries, and the time since the last tick. In a pipe, --watch prints
    one line for each sample.
    """
    window = timedelta(minutes=minutes)
    with connection.engine() as engine:
        if watch:
            _watch(engine, window, interval, json=json)
        elif json:
            print_json(_document(measure(engine, window)))
        else:
            console().print(table_of(measure(engine, window)))


def _watch(engine: Engine, window: timedelta, interval: float, *, json: bool) -> None:
    target = console()
    try:
        if json or not target.is_terminal:
            # Output into a pipe cannot be redrawn, so each sample is printed as one line.
            while True:
                look = measure(engine, window)
                print(json_module.dumps(_document(look)) if json else _line(look), flush=True)  # noqa: T201 - the result
                time.sleep(interval)
        _show_dashboard(target, lambda: measure_by_second(engine, window), interval)
    except KeyboardInterrupt:
        return


def _document(look: Stats) -> dict[str, Any]:
    counts, pace = look.counts, look.pace
    return {
        "at": rfc3339(look.at),
        "pending": counts.pending,
        "waiting": counts.waiting,
        "paused": counts.paused,
        "heldForHours": counts.quiet,
        "overdue": counts.overdue,
        "oldestOverdueSeconds": counts.oldest_overdue and round(counts.oldest_overdue.total_seconds(), 3),
        "inFlight": counts.in_flight,
        **counts.final,
        "estimated": sorted(counts.estimated),
        "windowMinutes": pace and pace.window / timedelta(minutes=1),
        "sentInWindow": pace and pace.sent,
        "sentPerMinute": pace and round(pace.per_minute, 2),
        "attempts": dict(look.attempts),
        "lastTickAgeSeconds": None if look.tick_age is None else round(look.tick_age.total_seconds(), 3),
        "lagMs": pace and {name: _milliseconds(getattr(pace, name)) for name in ("p50", "p95", "p99")},
    }


def _milliseconds(duration: timedelta | None) -> float | None:
    return None if duration is None else round(duration / MILLISECOND, 1)


def _facts(look: Stats) -> list[tuple[str, str, str]]:
    counts, pace = look.counts, look.pace
    oldest = f"the oldest for {span(counts.oldest_overdue)}" if counts.oldest_overdue else ""
    waiting = f"{counts.waiting:,} behind an earlier one of their chat" if counts.waiting else ""
    return [
        ("pending", f"{counts.pending:,}", waiting),
        ("overdue", f"{counts.overdue:,}", oldest),
        ("in flight", f"{counts.in_flight:,}", ""),
        *_held(counts),
        *(
            (status, f"{'~' if status in counts.estimated else ''}{number:,}", "")
            for status, number in counts.final.items()
        ),
        *(_paces(pace) if pace else [("lag", "-", f"not measured: it took longer than {span(store.LIMIT)}")]),
    ]


def _held(counts: Counts) -> list[tuple[str, str, str]]:
    held = [
        ("paused", counts.paused, "due, and held: followups pause --list"),
        ("quiet hours", counts.quiet, "due, and held until the sending hours of their workspaces open"),
    ]
    return [(name, f"{number:,}", remark) for name, number, remark in held if number]


def _paces(pace: Pace) -> list[tuple[str, str, str]]:
    lately = f"sent in the last {span(pace.window)}"
    lags = [
        (f"lag {name}", "-" if value is None else span(value), "")
        for name, value in (("p50", pace.p50), ("p95", pace.p95), ("p99", pace.p99))
    ]
    return [("throughput", f"{pace.per_minute:,.4g}/min", f"{pace.sent:,} {lately}"), *lags]


def table_of(look: Stats) -> Table:
    """Return the table of counts."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    table.add_column(style="dim")
    for name, value, remark in _facts(look):
        late = name == "overdue" and look.counts.overdue
        table.add_row(name, Text(value, style="red" if late else ""), remark)
    table.add_row("at", "", readable(look.at))
    return table


def _line(look: Stats) -> str:
    return f"{readable(look.at)}  " + "  ".join(f"{name} {value}" for name, value, _ in _facts(look))


@dataclass
class Workers:
    """The workers that reply to a status query.

    Workers are queried in a thread. Waiting for the workers' replies takes a second, and so does importing Celery.
    """

    said: str = "asking"
    ok: bool = True
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start a thread that queries the workers."""
        threading.Thread(target=self._run, name="workers", daemon=True).start()

    def stop(self) -> None:
        """Stop querying the workers."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            found = process_checks.workers(connection.ask_workers)
            self.said, self.ok = found.detail, found.ok
            self._stop.wait(ASK_WORKERS)


@dataclass
class Attempts:
    """Counts of the attempts' outcomes since the first sample, with rates per second."""

    first: Mapping[str, int] = field(default_factory=dict)
    last: Mapping[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    at: float = 0.0

    def see(self, attempts: Mapping[str, int], now: float) -> None:
        """Record the totals measured at ``now`` (in seconds)."""
        if not self.at:
            self.first = attempts
        elif now > self.at:
            self.rates = {
                name: (number - self.last.get(name, 0)) / (now - self.at) for name, number in attempts.items()
            }
        self.last, self.at = attempts, now

    def table(self) -> Table:
        """Return a table with one row for each outcome that has occurred."""
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
    """Return numbers as a one-line bar chart; the highest number is a full bar.

    >>> sparkline([0, 1, 2, 4, 8])
    ' ▁▂▄█'
    """
    highest = max(numbers, default=0)
    # Every number above zero gets a visible bar.
    return "".join(BARS[0 if not number else max(1, number * 8 // highest)] for number in numbers)


def _show_dashboard(target: Console, look: Callable[[], Stats], interval: float) -> None:
    """Refresh the screen until the user presses Ctrl-C, which raises KeyboardInterrupt."""
    workers, attempts = Workers(), Attempts()
    workers.start()
    try:
        with Live(console=target, auto_refresh=False) as live:
            while True:
                found = look()
                attempts.see(found.attempts, time.monotonic())
                live.update(dashboard(found, attempts, workers), refresh=True)
                time.sleep(interval)
    finally:
        workers.stop()


def dashboard(look: Stats, attempts: Attempts, workers: Workers) -> RenderableType:
    """Return the complete screen of ``followups stats --watch``."""
    top = Table.grid(padding=(0, 1), expand=True)
    top.add_column(ratio=3)
    top.add_column(ratio=2)
    top.add_row(
        Panel(table_of(look), title="follow-ups", title_align="left"),
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
    grid.add_row("workers", cell(workers.said, "" if workers.ok else "red"))
    return grid


def _throughput(look: Stats) -> Text:
    if look.per_second is None:
        return Text("not measured: it took too long", style="dim")
    highest = max(look.per_second, default=0)
    return Text.assemble((sparkline(look.per_second), "cyan"), f"  now {look.per_second[-1]:,}, at most {highest:,}")
