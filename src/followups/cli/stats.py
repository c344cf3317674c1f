"""The ``followups stats`` command."""

from __future__ import annotations

import json as json_module
import time
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from sqlalchemy import func, select

from followups.cli import connection, dashboard
from followups.cli.examples import examples
from followups.cli.output import Json, console, print_json
from followups.cli.times import readable, rfc3339, span
from followups.settings import get_settings
from followups.store import last_tick
from followups.store import overview as store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Engine

    from followups.store.overview import Counts, Pace

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the system. ``pace`` is None if it could not be measured in time."""

    at: datetime
    counts: Counts
    pace: Pace | None
    attempts: Mapping[str, int]
    """Attempts ever made, by outcome."""
    tick_age: timedelta | None
    per_second: Sequence[int] | None = None
    """Follow-ups sent in each of the last seconds, for the dashboard."""


@app.command(
    epilog=examples("followups stats", "followups stats --watch", "followups stats --minutes 60 --json"),
)
def stats(
    *,
    minutes: Annotated[float, typer.Option(min=0.1, max=10_080, help="For lag and throughput: the last so many.")] = 5,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks of --watch.")] = 2,
    json: Json = False,
) -> None:
    """Count follow-ups by state, and show how late they were sent and how many a minute.

    Lag is the acceptance minus the due date; it includes retries, waiting for rate limits, and due dates in the past.
    The count of pending follow-ups is exact. Each final state is exact up to 100,000; beyond that it is an estimate,
    marked with a tilde.

    With --watch on a terminal it becomes a dashboard, which adds the sends per second, the outcomes of attempts, the
    workers that answer, and the age of the last tick. In a pipe it prints one line for each look.
    """
    window = timedelta(minutes=minutes)
    with connection.engine() as engine:
        if watch:
            _watch(engine, window, interval, json=json)
        elif json:
            print_json(_document(_measure(engine, window)))
        else:
            console().print(table_of(_measure(engine, window)))


def _measure(engine: Engine, window: timedelta) -> Stats:
    with engine.begin() as opened:
        at = opened.execute(select(func.now())).scalar_one()
        counts = store.count(opened, window=get_settings().max_in_flight)
        return Stats(at, counts, store.pace(opened, window), store.attempts(opened), last_tick.last_tick_age(opened))


def look_at(engine: Engine, window: timedelta) -> Stats:
    """Read everything that the dashboard shows; lag and throughput cover the last ``window``."""
    look = _measure(engine, window)
    with engine.begin() as opened:
        return replace(look, per_second=store.per_second(opened, dashboard.SECONDS))


def _watch(engine: Engine, window: timedelta, interval: float, *, json: bool) -> None:
    target = console()
    try:
        if json or not target.is_terminal:
            # One line for each look: a pipe has no screen to redraw.
            while True:
                look = _measure(engine, window)
                print(json_module.dumps(_document(look)) if json else _line(look), flush=True)  # noqa: T201 - the result
                time.sleep(interval)
        dashboard.watch(target, lambda: look_at(engine, window), table_of, interval)
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
