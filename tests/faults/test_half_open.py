"""Tests for half-open connections: packets are still acknowledged, but no data arrives.

Only the service's own limits detect half-open connections; TCP keepalives and user timeouts do not.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from stack import wait_until
from web import FOLLOW_UPS, in_days

if TYPE_CHECKING:
    from collections.abc import Sequence

    import web
    from faults.figures import Figures
    from faults.proxy import Proxy
    from faults.rig import Rig
    from followups.embedded import Child

    Proxied = tuple[Rig, Sequence[Proxy]]

SLACK = 20.0
"""Extra seconds that assertions allow on a busy machine; the figures record the actual times."""

SAID = ("got no reply", '"broker_unreachable"', "Connection to broker lost")
"""Events that a worker logs when it notices a silent broker."""

DEFAULTS = {"FOLLOWUPS_LEASE": "60", "FOLLOWUPS_TRANSPORT_TIMEOUT": "10", "FOLLOWUPS_TICK_INTERVAL": "1"}
"""The default settings. The short tests use a shorter lease and therefore shorter limits."""

GRACE = 30.0
"""The seconds that an orchestrator allows between SIGTERM and SIGKILL."""

by_server = pytest.mark.parametrize("server", ["database", "broker"])


def proxy_of(server: str, proxies: Sequence[Proxy]) -> Proxy:
    """Return the proxy in front of the database or the broker."""
    return proxies[["database", "broker"].index(server)]


def working(rig: Rig) -> list[Child]:
    """Start workers and beat, use every connection, and create follow-ups that are due after the fault."""
    workers = rig.start(workers=2)
    rig.bulk(40, spread=1.0)
    rig.settle_down(within=60)
    rig.bulk(100, spread=2.0)
    time.sleep(rig.rng.random())
    return workers


def seconds_until_noticed(workers: Sequence[Child], server: str, proxy: Proxy) -> float:
    """Return the seconds until a database connection is closed, or all workers log a silent broker."""
    since = time.monotonic()
    if server == "database":  # if a database connection is lost, the process reconnects without a log line
        wait_until(proxy.given_up, within=90, every=0.05)
    else:
        logs = [worker.command.log for worker in workers]
        wait_until(lambda: all(any(words in log.read_text() for words in SAID) for log in logs), within=90, every=0.1)
    return time.monotonic() - since


def finished(rig: Rig, workers: Sequence[Child], figures: Figures, **seconds: float) -> None:
    """Check that all processes work again, and that every guarantee held."""
    rig.bulk(40, spread=1.0)
    rig.settle_down(within=60)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(rig.created)}
    assert all(worker.running for worker in workers)
    figures.keep(9, verdict, **{name: round(took, 1) for name, took in seconds.items()})


def dead_connections(proxied: Proxied, figures: Figures, server: str, limit: float) -> None:
    """Make all connections half-open; measure how long detection takes and when everything is sent."""
    rig, proxies = proxied
    proxy = proxy_of(server, proxies)
    workers = working(rig)
    proxy.freeze()
    since = time.monotonic()
    noticed = seconds_until_noticed(workers, server, proxy)
    rig.settle_down(within=120)
    took = time.monotonic() - since
    assert proxy.frozen >= len(workers)
    finished(rig, workers, figures, **{f"{server}_noticed_s": noticed, f"{server}_all_sent_after_s": took})
    assert noticed < limit + SLACK


@by_server
def test_dead_connections(server: str, proxied: Proxied, figures: Figures) -> None:
    """Worker and beat detect half-open connections and reconnect; all due follow-ups are sent."""
    dead_connections(proxied, figures, server, limit=5.0)


@pytest.mark.faults_long
@by_server
def test_dead_connections_with_default_limits(server: str, proxied: Proxied, figures: Figures) -> None:
    """With the default settings, half-open connections are detected within half a minute."""
    proxied[0].options |= DEFAULTS
    dead_connections(proxied, figures, server, limit=30.0)


def stalled(proxied: Proxied, figures: Figures, server: str, seconds: float) -> None:
    """Make a server stop answering; later, let it answer again or break its connections."""
    rig, proxies = proxied
    proxy = proxy_of(server, proxies)
    workers = working(rig)
    proxy.stall()
    since = time.monotonic()
    noticed = seconds_until_noticed(workers, server, proxy)
    time.sleep(max(0.0, since + seconds - time.monotonic()) + rig.rng.random())
    if rig.rng.random() < 0.5:
        proxy.cut()
    proxy.flow()
    returned = time.monotonic()
    (probe,) = rig.bulk(1)
    wait_until(lambda: rig.accepted(probe), within=90)
    goes_on = time.monotonic() - returned
    rig.settle_down(within=120)
    finished(rig, workers, figures, **{f"{server}_stall_noticed_s": noticed, f"{server}_goes_on_after_s": goes_on})
    assert goes_on < 10 + SLACK


@by_server
def test_stalled(server: str, proxied: Proxied, figures: Figures) -> None:
    """If a server stops responding, follow-ups are late by the length of the outage plus a few seconds."""
    stalled(proxied, figures, server, seconds=4.0)


@pytest.mark.faults_long
@by_server
def test_stalled_with_default_limits(server: str, proxied: Proxied, figures: Figures) -> None:
    """If a server is silent for a minute, the default settings keep the delay close to a minute."""
    proxied[0].options |= DEFAULTS
    stalled(proxied, figures, server, seconds=60.0)


def stopped_in_silence(proxied: Proxied, figures: Figures, silence: tuple[float, float]) -> None:
    """Stop all processes while the broker is silent; check that they exit cleanly, then start new ones."""
    rig, (_, broker) = proxied
    workers = working(rig)
    broker.stall()
    time.sleep(rig.rng.uniform(*silence))
    started = time.monotonic()
    leaving = [child for child in rig.processes.children if child.command.name != "sandbox"]
    for child in leaving:
        child.ask()
    wait_until(lambda: not any(child.running for child in leaving), within=60)
    took = time.monotonic() - started
    assert [child.exit_code for child in leaving] == [0] * len(leaving)
    assert len(rig.events("drained")) == len(workers)
    broker.flow()
    rig.beat()
    others = [rig.worker()]
    rig.settle_down(within=120)
    finished(rig, others, figures, stopped_with_a_silent_broker_after_s=took)
    assert took < GRACE + SLACK


def test_stopped_while_the_broker_is_silent(proxied: Proxied, figures: Figures) -> None:
    """SIGTERM drains and ends workers even while they wait for a silent broker."""
    stopped_in_silence(proxied, figures, silence=(0, 5))


@pytest.mark.faults_long
def test_stopped_while_the_broker_is_silent_for_long(proxied: Proxied, figures: Figures) -> None:
    """With default settings and a silent broker, SIGTERM ends workers within the grace period."""
    proxied[0].options |= DEFAULTS
    stopped_in_silence(proxied, figures, silence=(0, 40))


def seconds_until_answered(api: web.Api) -> float:
    """Return how long a request takes; any status is accepted."""
    started = time.monotonic()
    assert api.client.get(FOLLOW_UPS, timeout=90).status_code in {200, 503}
    return time.monotonic() - started


def test_web_with_a_stalled_broker(proxied: Proxied, figures: Figures) -> None:
    """If the broker does not answer, follow-ups are accepted without delay and sent later."""
    rig, (_, broker) = proxied
    rig.start()
    api = rig.web()
    with api.client:
        api.create(due=in_days(0))
        broker.stall()
        slowest = 0.0
        for _ in range(rig.rng.randrange(5, 15)):
            started = time.monotonic()
            rig.created.add(UUID(api.create(due=in_days(0))["id"]))
            slowest = max(slowest, time.monotonic() - started)
        broker.flow()
        rig.settle_down(within=60)
    figures.keep(9, rig.verdict(), web_slowest_create_s=round(slowest, 2))
    assert slowest < 2 + SLACK


@pytest.mark.faults_long
def test_web_with_a_stalled_database(proxied: Proxied, figures: Figures) -> None:
    """While the database does not respond, requests get 503 after a time limit."""
    rig, (database, _) = proxied
    api = rig.web()
    with api.client:
        assert seconds_until_answered(api) < SLACK
        database.stall()
        unanswered = seconds_until_answered(api)
        database.flow()
        started = time.monotonic()
        wait_until(lambda: api.client.get(FOLLOW_UPS, timeout=90).status_code == 200, within=60)
        back = time.monotonic() - started
    figures.keep(9, web_answers_503_after_s=round(unanswered, 1), web_goes_on_after_s=round(back, 1))
    assert 1 < unanswered < 60
    assert back < SLACK
