"""What a crash, a wiped broker or a lost database must not do: lose a follow-up, or send it twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from conftest import brisk_settings
from followups.database import BY_KEY, make_engine, migrate
from followups.embedded import EmbeddedPostgres, EmbeddedValkey, Processes, memory_directory
from stack import Stack, kill, wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

SEED = int(os.environ.get("FOLLOWUPS_TEST_SEED", random.SystemRandom().randrange(1_000_000)))
"""Printed by a failing test; set it to see the same again."""

SLACK = 10.0
"""Seconds beyond a lease (3 s here) and a tick, for a machine busy with other tests; it prints what it took."""


@pytest.fixture
def dice() -> random.Random:
    """Return a seeded source of chance, and print its seed."""
    print(f"FOLLOWUPS_TEST_SEED={SEED}")  # noqa: T201 - pytest shows it where a test fails
    return random.Random(SEED)  # noqa: S311 - not for secrets


@pytest.fixture
def own_servers() -> Iterator[tuple[EmbeddedPostgres, EmbeddedValkey]]:
    """Return servers that the test may kill."""
    with EmbeddedPostgres(parent=memory_directory()) as postgres, EmbeddedValkey() as valkey:
        migrate(postgres.url())
        yield postgres, valkey


@pytest.fixture
def breakable(own_servers: tuple[EmbeddedPostgres, EmbeddedValkey]) -> Iterator[Stack]:
    """Return the system on servers that the test may kill."""
    postgres, valkey = own_servers
    engine = make_engine(postgres.url(), options=BY_KEY)
    with Processes() as processes:
        stack = Stack(brisk_settings(postgres.url(), valkey.url()), World(engine), processes)
        yield stack
        stack.stop()
    engine.dispose()


def check_promises(stack: Stack, ids: list[UUID]) -> None:
    """Every one ended as sent, and was accepted once by its key."""
    ended = Counter(row.status for row in stack.world.rows(*ids))
    assert ended == {"sent": len(ids)}
    accepted = Counter(stack.accepted(*ids))
    assert accepted == Counter(map(str, ids))


def test_worker_killed_in_mid_batch(stack: Stack, dice: random.Random) -> None:
    """After SIGKILL in mid-batch another worker delivers all, each once by its key, within a lease and a tick."""
    worker = stack.start()
    other = stack.worker("worker2")
    other.signal(signal.SIGSTOP)  # started, so that the start's time is not the recovery's
    stack.behave(kind="slow", delay=0.2)
    ids = stack.world.burst([timedelta(milliseconds=dice.randrange(500)) for _ in range(300)])
    wait_until(lambda: len(stack.received()) > dice.randrange(20, 150))
    kill(worker)
    killed = time.monotonic()
    in_flight = stack.world.scalar("SELECT count(*) FROM follow_ups WHERE begun_at IS NOT NULL")
    stack.behave(kind="accept")
    other.signal(signal.SIGCONT)
    stack.wait_until_done(*ids, within=30)
    took = time.monotonic() - killed
    check_promises(stack, ids)
    assert in_flight > 0
    lost = stack.world.scalar("SELECT count(*) FROM failed_attempts WHERE outcome = 'lost'")
    assert lost == in_flight
    print(f"in flight {in_flight}, all sent {took:.1f} s after the kill")  # noqa: T201 - the figure of this fault
    limit = stack.settings.lease + stack.settings.tick_interval
    assert took < limit.total_seconds() + SLACK


def test_broker_flushed_in_mid_burst(stack: Stack, dice: random.Random) -> None:
    """A broker that loses all it holds delays what was queued by a lease and a tick, and loses nothing."""
    stack.start()
    ids = stack.world.burst([timedelta(milliseconds=dice.randrange(1500)) for _ in range(400)])
    for _ in range(5):
        time.sleep(dice.random() / 5)
        stack.broker().flushdb()
    stack.wait_until_done(*ids, within=30)
    check_promises(stack, ids)


def test_database_killed_under_load(
    breakable: Stack, own_servers: tuple[EmbeddedPostgres, EmbeddedValkey], dice: random.Random
) -> None:
    """After the database was killed and came back, all are sent, each once by its key; the processes stay up."""
    worker = breakable.start()
    ids = breakable.world.burst([timedelta(milliseconds=dice.randrange(4000)) for _ in range(200)])
    for _ in range(2):
        time.sleep(0.5 + dice.random())
        own_servers[0].kill()
        time.sleep(dice.random())
        own_servers[0].restart()
    breakable.wait_until_done(*ids, within=30)
    check_promises(breakable, ids)
    assert worker.running
    assert breakable.log_events("database_unreachable")


def test_broker_killed_under_load(
    breakable: Stack, own_servers: tuple[EmbeddedPostgres, EmbeddedValkey], dice: random.Random
) -> None:
    """After the broker was killed several times within seconds, consumption goes on and all are sent once."""
    breakable.start()
    ids = breakable.world.burst([timedelta(milliseconds=dice.randrange(4000)) for _ in range(200)])
    for _ in range(3):
        time.sleep(dice.random())
        own_servers[1].kill()
        time.sleep(dice.random())
        own_servers[1].restart()
    breakable.wait_until_done(*ids, within=40)
    check_promises(breakable, ids)


def test_started_before_its_servers(breakable: Stack, own_servers: tuple[EmbeddedPostgres, EmbeddedValkey]) -> None:
    """A worker and a beat that find neither database nor broker say which, wait, and begin when both are there."""
    follow_up = breakable.world.follow_up()
    for server in own_servers:
        server.kill()
    breakable.sandbox()
    breakable.beat()
    worker = breakable.worker(ready=False)
    log = breakable.processes.logs / "worker.log"
    wait_until(lambda: log.exists() and "Cannot connect to redis://" in log.read_text())
    wait_until(lambda: breakable.log_events("database_unreachable"))
    for server in own_servers:
        server.restart()
    breakable.wait_until_done(follow_up, within=30)
    assert breakable.accepted(follow_up) == [str(follow_up)]
    assert worker.running
