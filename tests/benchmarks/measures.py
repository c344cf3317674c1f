"""The measurements: each function measures one contestant and returns the figures by name."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from arena import BIN, FAR, wait
from contestants import Ours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from arena import Arena
    from contestants import Contestant

PATIENCE = 300.0
"""Time limit for one contestant's turn, in seconds."""
PORTION = 500_000
"""Number of filler rows inserted by one statement."""
Figures = dict[str, float]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that the given share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def throughput(contestant: Contestant, count: int, control: str = "") -> Figures:
    """Release a backlog; return the send rate, the time until 99 % have arrived, and the costs."""
    arena = contestant.arena
    arena.clear()
    arena.receiver(f"/control?{control}")
    contestant.fill(count, "now() + interval '1 day'")
    contestant.start()
    time.sleep(1.0)  # by now, every contestant that polls has polled at least once
    contestant.release()
    began, before = time.time(), arena.cpu_seconds()
    wait(lambda: arena.receiver("/count")["different"] >= count, PATIENCE)
    wait(lambda: contestant.sent() >= count, PATIENCE)
    all_sent, after = time.time() - began, arena.cpu_seconds()
    received = sorted(arena.receiver("/times").values())
    figures = {
        "per_s": count / all_sent,
        "received_99_percent_s": received[math.ceil(0.99 * count) - 1] - began,
        "cpu_us_each": 1e6 * (after["cpu"] - before["cpu"]) / count,
        "server_cpu_us_each": 1e6 * (after["server_cpu"] - before["server_cpu"]) / count,
        "requests_per_follow_up": arena.receiver("/count")["requests"] / count,
    }
    arena.processes.stop()
    return figures


def lag(contestant: Contestant, rate: float, seconds: float, *, snapshot: bool = False, ahead: float = 5.0) -> Figures:
    """Create follow-ups that fall due at ``rate`` per second; return their lags in milliseconds.

    The first follow-up is due ``ahead`` seconds after the insert, so that all processes are running by then.
    """
    arena = contestant.arena
    arena.clear()
    count = int(rate * seconds)
    # Inserting and publishing take time, especially with a million other rows.
    ahead += count / (500 if contestant.waits_in_broker else 4000)
    due = f"now() + interval '1 s' * ({ahead} + random() * {seconds})"
    if contestant.waits_in_broker:
        contestant.start()
        contestant.fill(count, due)
    else:
        contestant.fill(count, due)
        contestant.start()
    with _snapshot(arena, held=snapshot):
        wait(lambda: contestant.sent() >= count, PATIENCE, every=1.0)
    times, dues = arena.receiver("/times"), contestant.due()
    lags = [1000 * (moment - dues[name]) for name, moment in times.items()]
    arena.processes.stop()
    return {
        "p50_ms": percentile(lags, 0.5),
        "p95_ms": percentile(lags, 0.95),
        "p99_ms": percentile(lags, 0.99),
        "max_ms": max(lags),
        "earliest_ms": min(lags),
    }


class _snapshot:  # noqa: N801 - used as a statement
    """During the `with` block, keep a snapshot open, as a dump or a report would."""

    def __init__(self, arena: Arena, *, held: bool) -> None:
        self._arena, self._held = arena, held

    def __enter__(self) -> None:
        if self._held:
            import psycopg  # noqa: PLC0415 - here alone

            self._connection = psycopg.connect(self._arena.database)
            self._connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            self._connection.execute("SELECT count(*) FROM follow_ups")

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._connection.close()


def others_pending(arena: Arena, count: int) -> None:
    """Insert this many unrelated follow-ups that are due in a month or later, ten in each chat."""
    there = int(arena.sql(f"SELECT count(*) FROM follow_ups WHERE due_date >= {FAR} - interval '10 days'")[0][0])  # noqa: S608
    if there >= count:
        return
    indexes = arena.sql(
        "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index"
        " WHERE indrelid = 'follow_ups'::regclass AND NOT indisprimary"
    )
    # Without indexes and foreign keys, millions of rows are inserted in a tenth of the time.
    arena.sql("SET maintenance_work_mem = '1GB'; SET session_replication_role = replica")
    for name, _ in indexes:
        arena.sql(f"DROP INDEX {name}")
    for first in range(there, count, PORTION):
        more = min(PORTION, count - first)
        Ours(arena).fill(more, f"{FAR} + random() * interval '300 days'", each=10)
        sys.stderr.write(f"\r{first + more:,} others are pending ")
    for _, definition in indexes:
        arena.sql(definition)
    arena.sql("RESET session_replication_role; RESET maintenance_work_mem")
    arena.sql("VACUUM (ANALYZE) follow_ups")
    sys.stderr.write("\n")


def tick(arena: Arena, claims: int = 200) -> Figures:
    """Repeatedly claim a hundred due rows; return the median duration of a claim in milliseconds."""
    from followups.database import make_engine  # noqa: PLC0415 - here alone
    from followups.delivery.claim import claim  # noqa: PLC0415
    from followups.session_settings import BY_KEY  # noqa: PLC0415 - here alone
    from followups.settings import load_settings  # noqa: PLC0415

    arena.clear()
    Ours(arena).fill(claims * 10, "now() + random() * interval '1 s' - interval '1 hour'")
    settings = load_settings(database_url=arena.database, broker_url=arena.broker, max_in_flight=100)
    engine = make_engine(arena.database, options=BY_KEY)
    took = []
    for _ in range(claims):
        began = time.perf_counter()
        claimed = claim(engine, settings)
        took.append(1000 * (time.perf_counter() - began))
        ids = [lease.id for lease in claimed.leases]
        arena.sql("UPDATE follow_ups SET lease_until = NULL WHERE id = ANY(%s)", ids)
    engine.dispose()
    return {"claim_ms": statistics.median(took)}


def cost(contestant: Ours, count: int) -> Figures:
    """Return a backlog's cost: memory of worker and broker, and WAL and dead tuples per follow-up."""
    arena = contestant.arena
    arena.clear()
    contestant.fill(count, "now() + interval '1 day'")
    contestant.start()
    contestant.make_due()
    arena.sql("VACUUM follow_ups")
    wal = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
    before, wal_before = arena.broker_mb(), arena.sql(wal)[0][0]
    contestant.nudge()
    worker, broker = 0.0, 0.0
    end = time.monotonic() + PATIENCE
    while contestant.sent() < count and time.monotonic() < end:
        worker = max(worker, *(arena.memory_mb(child) for child in contestant.started))
        broker = max(broker, arena.broker_mb())
        time.sleep(0.2)
    bytes_each = float(arena.sql(wal)[0][0] - wal_before) / count
    time.sleep(1.5)  # gives PostgreSQL time to update its statistics
    dead = arena.sql("SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'follow_ups'")[0][0]
    arena.processes.stop()
    return {
        "worker_mb": worker,
        "broker_mb": broker,
        "broker_before_mb": before,
        "wal_bytes_each": bytes_each,
        "dead_tuples_each": dead / count,
    }


def startup(arena: Arena) -> Figures:
    """Return how long ``followups --help`` takes, and how long a worker takes to become ready."""
    arena.clear()
    began = time.monotonic()
    subprocess.run([BIN / "followups", "--help"], check=True, capture_output=True)
    took = time.monotonic() - began
    began = time.monotonic()
    Ours(arena).start_processes()
    ready = time.monotonic() - began
    arena.processes.stop()
    return {"help_s": took, "worker_ready_s": ready}


def spread(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the median, minimum and maximum of each figure."""
    return {
        name: {
            "median": statistics.median([one[name] for one in rounds]),
            "least": min(one[name] for one in rounds),
            "greatest": max(one[name] for one in rounds),
        }
        for name in rounds[0]
    }


def shuffled(names: Sequence[str], number: int) -> list[str]:
    """Return a random order for a round, so that no contestant is always first."""
    order = list(names)
    random.Random(number).shuffle(order)  # noqa: S311 - not for secrets
    return order
