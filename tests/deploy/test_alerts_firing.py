"""Tests in which real faults fire their alerts in a Prometheus that scrapes the system.

These tests take some minutes.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, make_url, text

from databases import SUPERUSER
from deploy.prometheus import MINUTE
from stack import kill, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from deploy.prometheus import Prometheus
    from followups.embedded import Child
    from stack import Stack

pytestmark = pytest.mark.faults_long


def the_worker(stack: Stack) -> Child:
    """Return the running worker."""
    (worker,) = (one for one in stack.processes.children if one.command.name.startswith("worker") and one.running)
    return worker


def another_worker(stack: Stack) -> None:
    """Start another worker, with a separate name and log."""
    stack.worker(f"worker-{len(stack.processes.children)}")


def replaced(stack: Stack, setting: str, value: str) -> None:
    """Replace the worker with one that has this setting, unless the worker already has it."""
    if setting not in stack.options:
        stack.options[setting] = value
        old = the_worker(stack)
        another_worker(stack)
        old.ask()
        wait_until(lambda: not old.running)


def chat_that(stack: Stack, kind: str, **more: object) -> UUID:
    """Return a chat for which the receiver behaves in the given way."""
    chat = stack.world.chat()
    stack.behave(chat, kind=kind, **more)
    return chat


def refused(stack: Stack) -> None:
    """Make the chat server reject every third message."""
    chats = [chat_that(stack, "reject"), stack.world.chat(), stack.world.chat()]
    stack.wait_until_done(*map(stack.world.follow_up, chats))


def rate_limited(stack: Stack) -> None:
    """Make the chat server limit the rate."""
    stack.world.follow_up(chat_that(stack, "rate_limit", retryAfter=60))
    time.sleep(0.5)


def unanswered(stack: Stack) -> None:
    """Make the chat server break connections and stop deduplicating."""
    replaced(stack, "FOLLOWUPS_TRANSPORT_DEDUPLICATES", "false")
    stack.wait_until_done(stack.world.follow_up(chat_that(stack, "drop")))


def too_slow(stack: Stack) -> None:
    """Make a hundred follow-ups due; there is one slot, and each call takes 0.4 seconds."""
    replaced(stack, "FOLLOWUPS_CONCURRENCY", "1")
    if not stack.world.scalar("SELECT count(*) FROM follow_ups"):
        stack.behave(kind="slow", delay=0.4)
        for _ in range(100):
            stack.world.follow_up()
    time.sleep(0.5)


def begun(stack: Stack) -> object:
    """Return when the newest attempt in flight began, or None."""
    return stack.world.scalar("SELECT max(begun_at) FROM follow_ups")


def poison(stack: Stack) -> None:
    """Kill three workers in turn, each while the same follow-up is in flight."""
    follow_up, last = stack.world.follow_up(chat_that(stack, "slow", delay=0.9)), None
    end = time.monotonic() + 60
    while stack.pending(follow_up):
        assert time.monotonic() < end
        if (now := begun(stack)) not in {None, last}:
            last = now
            kill(the_worker(stack))
            another_worker(stack)
        time.sleep(0.05)


def frozen(stack: Stack) -> None:
    """Freeze a worker with an attempt in flight, and resume it after another worker has taken over."""
    worker, follow_up = the_worker(stack), stack.world.follow_up(chat_that(stack, "slow", delay=0.9))
    wait_until(lambda: begun(stack))
    worker.signal(signal.SIGSTOP)
    another_worker(stack)
    stack.wait_until_done(follow_up, within=60)
    worker.signal(signal.SIGCONT)
    worker.ask()
    wait_until(lambda: not worker.running)


def locked(stack: Stack) -> None:
    """Lock the `follow_ups` table for longer than a claim may take."""
    with stack.world.engine.begin() as connection:
        connection.execute(text("LOCK TABLE follow_ups IN ACCESS EXCLUSIVE MODE"))
        time.sleep(1.5)


def no_sessions(stack: Stack) -> None:
    """Make the database refuse sessions for a while."""
    url = make_url(stack.settings.database_url.get_secret_value()).set(drivername="postgresql+psycopg")
    server = create_engine(url.set(database="postgres", username=SUPERUSER), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS false'))
        end = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
        connection.execute(end, {"name": url.database})
        time.sleep(6)
        connection.execute(text(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS true'))
    server.dispose()


# In these tests, a minute lasts only two seconds, so replacing a worker may trigger FollowUpsNothingSent.
NO_WORKER = {"FollowUpsTicksStopped", "FollowUpsNothingSent", "FollowUpsOverdue", "FollowUpsFarBehind", "FollowUpsLate"}
"""Alerts that may fire while a worker is missing, and shortly afterwards."""

FAULTS: list[tuple[Callable[[Stack], None], set[str], set[str]]] = [
    (refused, {"FollowUpsRejected"}, set()),
    (rate_limited, {"FollowUpsRateLimited"}, set()),
    (unanswered, {"FollowUpsOutcomeUnknown"}, {"FollowUpsTransportFailing", "FollowUpsNothingSent"}),
    (too_slow, {"FollowUpsOverdue", "FollowUpsFarBehind", "FollowUpsLate"}, {"FollowUpsNothingSent"}),
    (poison, {"FollowUpsPoisoned", "FollowUpsWorkersDying"}, NO_WORKER),
    (frozen, {"FollowUpsWorkersFrozen", "FollowUpsWorkersDying"}, NO_WORKER),
    (locked, {"FollowUpsTicksSlow"}, {"FollowUpsDatabaseUnreachable", "FollowUpsWebDown", "FollowUpsTicksStopped"}),
    (no_sessions, {"FollowUpsDatabaseUnreachable"}, {"FollowUpsTicksStopped"}),
]
"""For each fault: the alerts that must fire, and the alerts that may fire."""


@pytest.mark.parametrize(("fault", "woken", "besides"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_fault_fires_its_alerts(
    stack: Stack, prometheus: Prometheus, fault: Callable[[Stack], None], woken: set[str], besides: set[str]
) -> None:
    """Before the fault no alert fires; after it, the alerts for this fault fire, and no others."""
    wait_until(lambda: prometheus.ask(f"followups:pending offset {10 * MINUTE}s"), within=60)
    assert prometheus.firing() == set()
    seen: set[str] = set()
    began = time.monotonic()
    while not woken <= seen:
        assert time.monotonic() < began + 120, f"after two minutes only {seen}"
        fault(stack)
        seen = prometheus.fired(within=int(time.monotonic() - began) + 1)
    assert seen <= woken | besides
