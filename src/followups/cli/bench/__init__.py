"""``followups bench``: a benchmark on the configured servers, isolated from production data."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from followups.cli.bench.environment import BenchEnvironment, BenchPlan, prepared
from followups.cli.catalogue import examples
from followups.cli.failures import FAILED
from followups.cli.output import Json, print_json, remark, remarks, say
from followups.embedded.stop_signals import StopSignals
from followups.store import bench_schema as store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from followups.store.bench_schema import Outcome

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

MOST = 1_000_000
"""Maximum number of follow-ups in one benchmark. A benchmark is also limited in time."""
LONGEST = 600.0
LOOK = 0.2
LATER = timedelta(days=1)
AHEAD = timedelta(seconds=4)


@dataclass(frozen=True, slots=True)
class Lag:
    """The lag in milliseconds: the time of acceptance minus the due date."""

    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class Result:
    """The measurements of a benchmark."""

    count: int
    seconds: float | None
    per_second: float | None
    rate: float
    lag: Lag
    early: int
    unsent: int
    duplicates: int

    @property
    def ok(self) -> bool:
        """Whether every follow-up was sent exactly once, and none before its due date."""
        return not (self.unsent or self.duplicates or self.early)


@app.command(
    epilog=examples(
        "followups bench", "followups bench --count 50000 --workers 2", "followups bench --rate 500 --seconds 30 --json"
    )
)
def bench(
    *,
    count: Annotated[int, typer.Option(min=1, max=MOST, help="Follow-ups of the backlog.")] = 10_000,
    rate: Annotated[
        float, typer.Option(min=1, max=10_000, help="Second phase: follow-ups a second that fall due.")
    ] = 100,
    seconds: Annotated[float, typer.Option(min=1, max=LONGEST, help="Seconds of the second phase.")] = 10,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 1,
    delay: Annotated[float, typer.Option(min=0, max=60, help="Seconds until the receiver answers.")] = 0,
    json: Json = False,
) -> None:
    """Measure throughput, lag and duplicates on the configured database and broker.

    The benchmark uses a separate schema and separate broker keys, and starts its own beat and workers. They deliver to
    a built-in receiver on this machine, so nothing reaches your chat server. Everything is removed afterwards. The
    benchmark puts real load on the servers, so avoid running it against production. The first phase measures the
    throughput of a backlog of follow-ups that are all due at the same moment. The second phase measures the lag at a
    steady rate. The exit code is 0 if every follow-up was sent exactly once and none was sent early. The database role
    must be allowed to create a schema, as the role that owns the tables is.
    """
    if rate * seconds > MOST:
        message = (
            f"That would be {rate * seconds:,.0f} follow-ups; at most {MOST:,} are sent. Lower --rate or --seconds."
        )
        raise typer.BadParameter(message, param_hint="--rate")
    with StopSignals() as signals, prepared(BenchPlan(workers, delay, remark)) as place:
        result = _measure(place, signals, count, rate, seconds)
    if json:
        print_json(_document(result))
    else:
        _show(result)
    if not result.ok:
        raise typer.Exit(FAILED)


def _measure(place: BenchEnvironment, signals: StopSignals, count: int, rate: float, seconds: float) -> Result:
    with place.engine.begin() as connection:
        ids = store.fill(connection, place.workspace_id, count, LATER, timedelta(0))
    time.sleep(1.0)  # gives the inserted rows time to become visible, and the workers time to become idle
    with place.engine.begin() as connection:
        store.release(connection, ids)
    backlog = _watch(place, signals, ids, "backlog")
    with place.engine.begin() as connection:
        steady_ids = store.fill(
            connection, place.workspace_id, max(1, int(rate * seconds)), AHEAD, timedelta(seconds=seconds)
        )
    steady = _watch(place, signals, steady_ids, f"{rate:g}/s")
    sent = backlog.sent + steady.sent
    return Result(
        count=count,
        seconds=backlog.seconds,
        per_second=backlog.sent / backlog.seconds if backlog.seconds else None,
        rate=rate,
        lag=Lag(steady.p50, steady.p95, steady.p99, steady.most),
        early=backlog.early + steady.early,
        unsent=len(ids) + len(steady_ids) - sent,
        duplicates=max(0, place.requests() - sent),
    )


def _watch(place: BenchEnvironment, signals: StopSignals, ids: Sequence[UUID], title: str) -> Outcome:
    """Wait until every follow-up has ended, for at most `LONGEST` seconds."""
    deadline = time.monotonic() + LONGEST
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=remarks(), transient=True) as progress:
        task = progress.add_task(title, total=len(ids))
        while True:
            with place.engine.connect() as connection:
                outcome = store.outcome(connection, ids)
            progress.update(task, completed=len(ids) - outcome.pending)
            if not outcome.pending or time.monotonic() > deadline:
                return outcome
            signals.check()
            place.check()
            time.sleep(LOOK)


def _document(result: Result) -> dict[str, object]:
    return {
        "throughput": {"count": result.count, "seconds": result.seconds, "perSecond": result.per_second},
        "lagMs": {"rate": result.rate, **asdict(result.lag)},
        "duplicates": result.duplicates,
        "early": result.early,
        "unsent": result.unsent,
        "ok": result.ok,
    }


def _show(result: Result) -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f}"

    lag = result.lag
    say(f"throughput  {number(result.per_second)} follow-ups/s ({result.count:,} due at once)")
    say(
        f"lag         p50 {number(lag.p50)}  p95 {number(lag.p95)}  p99 {number(lag.p99)}  max {number(lag.max)} ms"
        f" (at {result.rate:g}/s)"
    )
    say(f"duplicates  {result.duplicates}    early {result.early}    not sent {result.unsent}")
