"""Measures the figures of SCALING.md for many dispatchers and for a partitioned history table.

    uv run python tests/benchmarks/scale.py claim --rows 1000000 --dispatchers 1,2,4,8,16 --seconds 5
    uv run python tests/benchmarks/scale.py claim --rows 200000 --dispatchers 1 --window 100000 --held 33000
    uv run python tests/benchmarks/scale.py history --rows 1000000

The program checks only that no row is claimed twice or lost. The program ends within a few minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, text

from followups.database import make_engine
from followups.delivery.claim import size_of_claim
from followups.embedded import EmbeddedPostgres
from followups.schema import migrate
from followups.session_settings import BY_KEY
from followups.settings import Settings
from followups.states import ReasonCode, Status, finish
from followups.store import claims, leases

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.queues import Queue
    from multiprocessing.synchronize import Barrier

WINDOW = int(Settings.model_fields["max_in_flight"].default)
FINAL = finish(Status.CANCELLED, ReasonCode.CHAT_REMOVED)
"""The final state that this program gives to leased follow-ups instead of an attempt."""

CHATS = 10_000
MONTHS = 4

_CHATS = text("""
    INSERT INTO chats (workspace_id, id, last_message_id, last_message_role, last_message_at)
    SELECT :workspace, gen_random_uuid(), gen_random_uuid(), 'agent', now() FROM generate_series(1, :chats)
""")
# Consecutive rows belong to different chats, as if they had been created in random order.
_ROWS = """
    INSERT INTO follow_ups (workspace_id, chat_id, due_date, message, trigger_chat_message_id {columns})
    SELECT :workspace, chat.id, now() - n * interval '1 ms', 'Still there?', gen_random_uuid() {values}
      FROM generate_series(1, :rows) AS n
      JOIN (SELECT id, row_number() OVER () AS number FROM chats) AS chat ON chat.number = n % :chats + 1
"""


@contextmanager
def filled(rows: int, columns: str = "", values: str = "") -> Iterator[tuple[str, Engine]]:
    """Start a server with the given number of due follow-ups; yield its URL and an engine."""
    with EmbeddedPostgres() as postgres:
        migrate(postgres.url())
        engine = make_engine(postgres.url(), statement_timeout=None)
        with engine.begin() as connection:
            workspace = connection.execute(text("INSERT INTO workspaces (name) VALUES ('x') RETURNING id")).scalar_one()
            counts = {"workspace": workspace, "chats": CHATS, "rows": rows}
            connection.execute(_CHATS, {"workspace": workspace, "chats": CHATS})
            connection.execute(text(_ROWS.format(columns=columns, values=values)), counts)
        vacuum(engine)
        yield postgres.url(), engine
        engine.dispose()


def vacuum(engine: Engine) -> None:
    """Vacuum the table and update its statistics, as autovacuum would."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE follow_ups"))


def dispatch(url: str, ready: Barrier, results: Queue[Any], options: argparse.Namespace) -> None:
    """Claim as a dispatcher does, then end the leases; return the ids and each claim's duration."""
    engine = make_engine(url, pool_size=1, options=BY_KEY)
    most, more = size_of_claim(options.window), False
    look = claims.ClaimSearch(timedelta(seconds=2), timedelta(minutes=1), options.window, most)
    ids: list[str] = []
    took: list[float] = []
    engine.connect().close()
    ready.wait()
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        with engine.begin() as connection:
            taken = (claims.claim_fairly if more else claims.claim)(connection, look)
        look, more = replace(look, since=taken.low_water), taken.more
        took.append(time.perf_counter() - began)
        ids += [str(one.id) for one in taken.leases]
        end_all(engine, taken.leases)
    results.put((ids, took))
    engine.dispose()


def end_all(engine: Engine, held: list[leases.Lease]) -> None:
    """End the given leases without an attempt; try again while other dispatchers lock their rows."""
    while held:
        with engine.begin() as connection:
            ended = leases.end_if_not_begun(connection, [(lease, FINAL) for lease in held])
        held = [lease for lease in held if lease.id not in ended]


# Leases the earliest follow-ups for an hour, as another worker would.
_HOLD = text("""
    UPDATE follow_ups SET lease_token = 1, lease_until = now() + interval '1 hour'
     WHERE id IN (SELECT id FROM follow_ups ORDER BY due_date LIMIT :held)
""")


def claim(options: argparse.Namespace) -> dict[str, Any]:
    """Measure claims with more and more dispatchers on the same table."""
    found = {}
    with filled(options.rows) as (url, engine):
        with engine.begin() as connection:
            connection.execute(_HOLD, {"held": options.held})
        for number in map(int, options.dispatchers.split(",")):
            found[f"{number} dispatchers"] = together(url, number, options)
            print(number, found[f"{number} dispatchers"], file=sys.stderr)  # noqa: T201 - how far it is
            vacuum(engine)  # as autovacuum does, so that dead rows do not slow down claims
    return found


def together(url: str, number: int, options: argparse.Namespace) -> dict[str, float]:
    """Run this many dispatchers in separate processes, which claim concurrently."""
    context = get_context("spawn")
    ready, queue = context.Barrier(number), context.Queue()
    processes = [context.Process(target=dispatch, args=(url, ready, queue, options)) for _ in range(number)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    ids = [id_ for each, _ in results for id_ in each]
    assert len(ids) == len(set(ids)), "claimed twice"
    cuts = quantiles([one for _, each in results for one in each], n=100)
    return {
        "claimed and ended a second": round(len(ids) / options.seconds),
        "claim p50 ms": round(cuts[49] * 1000, 1),
        "claim p99 ms": round(cuts[98] * 1000, 1),
    }


_COLUMNS = ", status, finished_at, created_at"
_PARTITIONED = """
    CREATE TABLE follow_ups_history (LIKE follow_ups INCLUDING DEFAULTS) PARTITION BY RANGE (finished_at);
    CREATE INDEX ON follow_ups_history (id);
    CREATE INDEX ON follow_ups_history (workspace_id, status, created_at DESC, id);
"""
_MOVE = text("""
    WITH old AS (
        SELECT id FROM follow_ups WHERE status <> 'pending' AND finished_at < now() - interval '1 day' LIMIT 5000
    ), gone AS (
        DELETE FROM follow_ups f USING old WHERE f.id = old.id RETURNING f.*
    )
    INSERT INTO follow_ups_history SELECT * FROM gone
""")


def history(options: argparse.Namespace) -> dict[str, Any]:
    """Move ended rows into monthly partitions; compare dropping a partition with deleting rows."""
    ended = f"now() - interval '2 days' - (n % {MONTHS}) * interval '31 days'"
    with filled(options.rows, _COLUMNS, f", 'sent', {ended}, {ended}") as (_, engine), engine.connect() as connection:
        size = connection.execute(text("SELECT pg_total_relation_size('follow_ups')")).scalar_one()
        deleted = timed(connection, "DELETE FROM follow_ups WHERE finished_at < now() - interval '80 days'")
        connection.rollback()
        partition(connection)
        began, moved = time.perf_counter(), 0
        while count := connection.execute(_MOVE).rowcount:
            connection.commit()
            moved += count
        took = time.perf_counter() - began
        dropped = timed(connection, "DROP TABLE follow_ups_history_3")
        connection.commit()
        left = connection.execute(text("SELECT count(*) FROM follow_ups_history")).scalar_one()
    assert moved == options.rows
    assert left == options.rows - options.rows // MONTHS
    return {
        "history": {
            "rows": options.rows,
            "bytes a row with its indexes": round(size / options.rows),
            "moved a second": round(moved / took),
            "delete of a month s": round(deleted, 2),
            "drop of a month ms": round(dropped * 1000, 1),
        }
    }


def partition(connection: Connection) -> None:
    """Create the history table, partitioned by the month in which each follow-up ended."""
    connection.execute(text(_PARTITIONED))
    for number in range(MONTHS):
        bounds = [f"now() - interval '{31 * (number + 1 - end)} days'" for end in (0, 1)]
        since, until = connection.execute(text(f"SELECT CAST({bounds[0]} AS text), CAST({bounds[1]} AS text)")).one()
        connection.execute(
            text(
                f"CREATE TABLE follow_ups_history_{number} PARTITION OF follow_ups_history"
                f" FOR VALUES FROM ('{since}') TO ('{until}')"
            )
        )
    connection.commit()


def timed(connection: Connection, statement: str) -> float:
    """Execute a statement; return its duration in seconds."""
    began = time.perf_counter()
    connection.execute(text(statement))
    return time.perf_counter() - began


def main() -> int:
    """Run the requested measurement, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["claim", "history"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dispatchers", default="1,2,4,8,16")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--window", type=int, default=WINDOW, help="what may be in flight (default: the setting's)")
    parser.add_argument("--held", type=int, default=0, help="what is in flight already (default: 0)")
    options = parser.parse_args()
    print(json.dumps({"claim": claim, "history": history}[options.what](options), indent=2))  # noqa: T201 - the result
    return 0


if __name__ == "__main__":
    sys.exit(main())
