"""``followups bench``: a benchmark on the configured servers, isolated from production data.

The benchmark has its own schema, broker keys and processes.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import redis
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy.orm import Session

from followups import schema
from followups.cli.entry import examples
from followups.cli.failures import FAILED
from followups.cli.output import Json, print_json, print_line, remark, remarks
from followups.database import make_engine
from followups.embedded import EmbeddedError, Processes, answers, free_port
from followups.embedded.processes import argv, search_path
from followups.embedded.stop_signals import StopSignals
from followups.settings import get_settings, load_settings
from followups.store import bench_schema, workspaces
from followups.store import bench_schema as store
from followups.urls import database_url as parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings
    from followups.store.bench_schema import Outcome


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

MOST = 1_000_000
"""Maximum number of follow-ups in one benchmark. A benchmark also has a time limit."""
LONGEST = 600.0
LOOK = 0.2
LATER = timedelta(days=1)
AHEAD = timedelta(seconds=4)


@dataclass(frozen=True, slots=True)
class Lag:
    """Lag in milliseconds, from the due date to the acceptance of the message."""

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
    count: Annotated[int, typer.Option(min=1, max=MOST, help="Number of follow-ups in the backlog.")] = 10_000,
    rate: Annotated[float, typer.Option(min=1, max=10_000, help="Second phase: follow-ups due per second.")] = 100,
    seconds: Annotated[float, typer.Option(min=1, max=LONGEST, help="Duration of the second phase, in seconds.")] = 10,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 1,
    delay: Annotated[float, typer.Option(min=0, max=60, help="Response time of the receiver, in seconds.")] = 0,
    json: Json = False,
) -> None:
    """Measure throughput, lag and duplicates on the configured database and broker.

    The benchmark uses a separate schema and separate broker keys, and starts its own beat and workers. They deliver to
    a receiver built into the benchmark, so nothing reaches your chat server. Everything is removed afterwards. The
    benchmark puts real load on the servers, so avoid running it against production. The first phase measures the
    throughput of a backlog of follow-ups that are all due at the same moment. The second phase measures the lag at a
    steady rate. The exit code is 0 if every follow-up was sent exactly once and none was sent early. The database role
    must be allowed to create a schema, as the tables' owner is.
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
    """Wait until every follow-up has ended, but no longer than `LONGEST` seconds."""
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
    print_line(f"throughput  {number(result.per_second)} follow-ups/s ({result.count:,} due at once)")
    print_line(
        f"lag         p50 {number(lag.p50)}  p95 {number(lag.p95)}  p99 {number(lag.p99)}  max {number(lag.max)} ms"
        f" (at {result.rate:g}/s)"
    )
    print_line(f"duplicates  {result.duplicates}    early {result.early}    not sent {result.unsent}")


GRACE = timedelta(seconds=30)
READY_WITHIN = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """The processes that a benchmark starts."""

    workers: int
    delay: float
    """Seconds that the receiver waits before it responds."""
    tell: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BenchEnvironment:
    """A prepared benchmark environment."""

    engine: Engine
    workspace_id: UUID
    _receiver: str
    _processes: Processes

    def check(self) -> None:
        """Raise `EmbeddedError` if a process has ended."""
        for child in self._processes.ended():
            message = f"{child.command.name} ended early. The end of its log:\n{child.tail()}"
            raise EmbeddedError(message)

    def requests(self) -> int:
        """Return the number of requests that the receiver has received."""
        with urllib.request.urlopen(f"{self._receiver}/count", timeout=10) as answer:  # noqa: S310 - our own loopback URL
            return int(json.load(answer)["requests"])


@contextmanager
def prepared(plan: BenchPlan) -> Iterator[BenchEnvironment]:
    """Yield an environment with a schema, receiver, beat and workers, and remove everything afterwards."""
    with ExitStack() as stack:
        name = f"{bench_schema.PREFIX}{secrets.token_hex(6)}"
        connection = stack.enter_context(_connection(get_settings()))
        bench_schema.create_schema(connection, name)
        stack.callback(bench_schema.drop_schema, connection, name)
        port = free_port()
        receiver = f"http://127.0.0.1:{port}"
        processes = Processes()
        settings = _settings(name, receiver, str(processes.logs))
        stack.callback(_delete_broker_keys, settings)
        stack.enter_context(processes)
        url = settings.database_url.get_secret_value()
        plan.tell("Creating a separate schema")
        schema.migrate(url)
        engine = make_engine(url, pool_size=2, application_name="followups-bench")
        stack.callback(engine.dispose)
        with Session(engine) as session, session.begin():
            workspace_id = workspaces.create(session, "bench")[0].id
        plan.tell(f"Starting receiver, beat and {plan.workers} worker{'s' if plan.workers > 1 else ''}")
        _start(processes, settings, plan, port)
        yield BenchEnvironment(engine, workspace_id, receiver, processes)
        plan.tell("Cleaning up")


@contextmanager
def _connection(settings: Settings) -> Iterator[Connection]:
    engine = make_engine(settings.database_url.get_secret_value(), pool_size=1, statement_timeout=None)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _settings(name: str, receiver: str, runtime: str) -> Settings:
    configured = get_settings()
    url = parse(configured.database_url.get_secret_value()).set(drivername="postgresql")
    options = f"{url.query.get('options', '')} -csearch_path={name}".strip()
    own = {
        "database_url": url.update_query_dict({"options": options}).render_as_string(hide_password=False),
        "broker_prefix": f"{configured.broker_prefix}{name}:",
        "transport": "http",
        "transport_url": f"{receiver}/messages",
        "runtime_dir": runtime,
    }
    return load_settings(**configured.model_dump() | own)


def _start(processes: Processes, settings: Settings, plan: BenchPlan, port: int) -> None:
    module = [sys.executable, "-m", "followups.embedded.receiver", "--port", str(port)]
    receiver = f"http://127.0.0.1:{port}"
    processes.spawn("receiver", module, ready=answers(f"{receiver}/count"), within=READY_WITHIN)
    with urllib.request.urlopen(f"{receiver}/control?delay={plan.delay}", timeout=10):  # noqa: S310 - our own loopback URL
        pass
    environment = settings.environment() | {"PATH": search_path()}
    processes.spawn("beat", argv("beat"), environment=environment, grace=GRACE)
    for number in range(plan.workers):
        named = environment | {"HONCHO_PROCESS_NAME": f"bench{number}"}
        log = processes.logs / f"worker{number}.log"
        processes.spawn(
            f"worker{number}",
            argv("worker"),
            environment=named,
            ready=lambda log=log: log.exists() and "ready." in log.read_text(),  # type: ignore[misc]
            within=READY_WITHIN,
            grace=GRACE,
        )


def _delete_broker_keys(settings: Settings) -> None:
    """Delete the broker keys created by the workers and by beat."""
    with redis.Redis.from_url(settings.broker_url.get_secret_value()) as broker:
        for key in broker.scan_iter(match=f"{settings.broker_prefix}*", count=1000):
            broker.delete(key)
