"""Tests of a failover to a replica: no message is lost or sent twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from commits import break_once
from conftest import brisk_settings
from databases import OWNER, SERVICE, make_roles, url_as, url_of
from faults.replica import INSTALLED, MISSING, Replicated, ask, socket_of
from faults.rig import REPLICATED, Load, own_servers
from followups.database import make_engine
from followups.database_errors import takes_changes
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.embedded import postgres as embedded
from followups.schema import migrate
from followups.session_settings import BY_KEY
from stack import wait_until
from world import World, begun

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from uuid import UUID

    import web
    from faults.figures import Figures
    from faults.rig import Rig

BEGUN = "SELECT count(*) FROM follow_ups WHERE begun_at IS NOT NULL"
COMMAND = str(Path(sys.executable).with_name("followups"))

BACK_WITHIN = 10.0
"""Seconds within which requests and sends must continue after the address has moved."""

NOTICED_WITHIN = 30.0
"""Seconds within which a process must notice the failover, even on a busy machine."""


@pytest.fixture
def replicated(request: pytest.FixtureRequest, dice: random.Random) -> Iterator[Rig]:
    """Return a system with a PostgreSQL primary, a standby, and one address that can point to either.

    By default, the newest PostgreSQL is used.
    """
    binaries = getattr(request, "param", embedded.BINARIES) or pytest.skip(MISSING)
    with own_servers(dice, kinds=frozenset({REPLICATED}), binaries=binaries) as (rig, _):
        yield rig


@dataclass
class Clients:
    """A client that sends one request after another, and records the time of each success."""

    api: web.Api
    chat: UUID
    succeeded: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    def run(self, stopping: threading.Event) -> None:
        """Send requests until the client is stopped."""
        while not stopping.wait(0.05):
            try:
                status = self.api.message(str(self.chat), "agent").status_code
            except httpx.HTTPError:
                continue
            if status == 201:
                self.succeeded.append(time.monotonic())
            else:
                self.refused.append(status)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Send requests from a separate thread."""
        stopping = threading.Event()
        thread = threading.Thread(target=self.run, args=(stopping,))
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()


def command(rig: Rig, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the same environment as the system's processes."""
    environment = os.environ | rig.environment()
    return subprocess.run(
        [COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def everything_says_read_only(rig: Rig, clients: Clients) -> None:
    """Check what each component reports while the address leads to a read-only server."""

    def worker_says() -> bool:
        ran = command(rig, "health", "worker")
        return ran.returncode == 0 and "cannot work: the database is read-only" in ran.stdout

    wait_until(worker_says, NOTICED_WITHIN, every=0.5)
    readiness = clients.api.client.get("/readyz")
    assert readiness.status_code == 503
    assert "database (it is read-only" in readiness.json()["detail"]
    assert "accepts no changes" in clients.api.message(str(clients.chat), "agent").json()["detail"]

    def doctor_says() -> bool:
        findings = {each["name"]: each for each in json.loads(command(rig, "doctor", "--json").stdout)["checks"]}
        assert "is read-only" in findings["database"]["detail"]
        assert "Wait for the failover to end" in findings["database"]["advice"]
        assert not any("more workers" in each["advice"] for each in findings.values())
        return "cannot work: the database is read-only" in findings["workers"]["detail"]

    # A worker can still read the time from a read-only server, and so appears healthy for a short time.
    wait_until(doctor_says, NOTICED_WITHIN)


def fail_over(rig: Rig, clients: Clients, *, killed: bool) -> tuple[float, float]:
    """Move the address to the standby; return the seconds until the first request and the first send."""
    postgres = rig.postgres
    assert isinstance(postgres, Replicated)
    if killed:
        postgres.kill()
    postgres.promote()
    everything_says_read_only(rig, clients)
    postgres.move()
    moved = time.monotonic()
    wait_until(lambda: clients.succeeded and clients.succeeded[-1] > moved, within=60)
    served = next(at for at in clients.succeeded if at > moved)
    (probe,) = rig.bulk(1)
    wait_until(lambda: rig.accepted(probe), within=60)
    sent = time.monotonic()
    postgres.replace_standby()
    return served - moved, sent - moved


def failovers(
    rig: Rig, figures: Figures, times: int, between: tuple[float, float], rate: float, workers: int = 2
) -> None:
    """Fail over ``times`` times under load; check each time that requests and deliveries continue."""
    started = rig.start(workers, beats=workers)
    clients = Clients(rig.web(), rig.world.chat())
    took = []
    with clients.api.client, Load(rig, rate, seconds=3600) as load, clients.calling():
        for number in range(times):
            time.sleep(rig.rng.uniform(*between))
            took.append(fail_over(rig, clients, killed=number % 2 == 1))
    rig.settle_down(within=60)
    verdict = rig.verdict()
    assert verdict.ended.keys() == {"sent"}
    assert verdict.ended["sent"] >= len(load.ids) + times
    assert all(worker.running for worker in started)
    assert set(clients.refused) <= {503}
    wait_until(lambda: "cannot work" not in command(rig, "health", "worker").stdout, NOTICED_WITHIN, every=0.5)
    figures.keep(
        22,
        verdict,
        failovers=times,
        first_request_after_move_max_s=round(max(served for served, _ in took), 2),
        first_sent_after_move_max_s=round(max(sent for _, sent in took), 2),
        refused_to_clients=len(clients.refused),
    )
    assert max(max(each) for each in took) < 2 * BACK_WITHIN


@pytest.mark.parametrize("replicated", [embedded.BINARIES, INSTALLED], indirect=True, ids=["embedded", "installed"])
def test_failover(replicated: Rig, figures: Figures) -> None:
    """Requests and deliveries continue after a failover that makes the database read-only for a while."""
    failovers(replicated, figures, times=1, between=(0.5, 1.0), rate=40, workers=1)


@pytest.mark.faults_long
def test_failovers_for_minutes(replicated: Rig, figures: Figures) -> None:
    """After many failovers, requests and deliveries continue, whether the primary was stopped or killed."""
    failovers(replicated, figures, times=12, between=(2, 15), rate=60)


@pytest.mark.faults_long
def test_failovers_with_a_url_for_any_server(replicated: Rig, figures: Figures) -> None:
    """If the database URL allows any server, requests and sends continue after a failover."""
    url = replicated.settings.database_url.get_secret_value()
    replicated.options["FOLLOWUPS_DATABASE_URL"] = f"{url}&target_session_attrs=any"
    failovers(replicated, figures, times=6, between=(2, 15), rate=60)


def test_several_hosts_in_the_url() -> None:
    """If the URL names two servers, connections go to the writable one, even after a failover."""
    with Replicated() as postgres:
        hosts = f"{socket_of(postgres.primary)},{socket_of(postgres.standby)}"
        engine = make_engine(f"postgresql://postgres@/postgres?host={hosts}")
        for _ in range(2):
            with engine.connect() as connection:
                host = connection.execute(text("SHOW unix_socket_directories")).scalar_one()
                assert (host, takes_changes(connection)) == (str(socket_of(postgres.primary)), True)
            postgres.promote()
        engine.dispose()


def test_a_begin_lost_in_an_asynchronous_failover_fails(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a failover loses both a begin and its response, the begin immediately counts as failed.

    If a new transaction reuses the lost transaction's id, it is not mistaken for the lost one.
    """
    with Replicated(synchronous=False) as postgres:
        make_roles(postgres.url())
        url = url_of(postgres.url(), SERVICE)
        migrate(url_as(url, OWNER))
        engine = make_engine(url, options=BY_KEY)
        settings, world = brisk_settings(url, broker_url), World(engine)
        settings = settings.model_copy(update={"lease": settings.lease * 100})
        for burnt in (0, 50):
            follow_up = world.follow_up()
            leases = claim(engine, settings).leases
            postgres.detach()

            def fail_over(connection: psycopg.Connection, burnt: int = burnt) -> None:
                connection.commit()
                postgres.kill()
                postgres.restart()
                with psycopg.connect(postgres.url(), autocommit=True) as other:
                    for _ in range(burnt):
                        other.execute("SELECT pg_current_xact_id()")

            break_once(monkeypatch, fail_over)
            started = time.monotonic()
            with pytest.raises(OperationalError):
                begin(engine, settings, leases)
            assert time.monotonic() - started < 10
            assert world.row(follow_up).begun_at is None
            assert begun(begin(engine, settings, leases)) == {follow_up}
            assert ask(postgres.primary, BEGUN, SERVICE) == "1"
            world.sql("DELETE FROM follow_ups")
        engine.dispose()
