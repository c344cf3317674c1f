"""Tests of doctor's checks for temporary problems."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import redis
from sqlalchemy import text

from followups.database import make_engine
from followups.flow_control.breaker import BreakerStore, OutcomeReport, WorkspaceOutcomes
from followups.operations.doctor import broker_checks, checks, database_checks
from followups.operations.doctor.broker_checks import of_broker
from followups.operations.doctor.database_checks import of_database, of_rooms
from followups.store import pauses
from followups.store.pauses import PauseScope
from world import World

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from followups.operations.doctor import Finding
    from followups.settings import Settings


def found(settings: Settings, engine: Engine) -> dict[str, Finding]:
    """Return doctor's findings about the database, keyed by name."""
    return {finding.name: finding for finding in of_database(settings, engine)}


def test_no_advice(settings: Settings, engine: Engine, world: World) -> None:
    """If no follow-up is overdue, doctor gives no advice."""
    world.follow_up(due=timedelta(hours=1))
    findings = found(settings, engine)
    assert [name for name, finding in findings.items() if not finding.ok] == []
    assert findings["backlog"].detail == "1 pending, 0 in flight, 0 overdue"
    assert findings["attempts"].detail == "failed in the last hour: none"


def test_hidden_transactions(settings: Settings, engine: Engine, unprivileged_url: str) -> None:
    """If doctor's database role cannot see other roles' transactions, doctor names the missing grant."""
    unprivileged = make_engine(unprivileged_url)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        transactions = found(settings, unprivileged)["transactions"]
    unprivileged.dispose()
    assert transactions.ok
    assert "those of other roles are hidden (GRANT pg_read_all_stats TO role_of_test_" in transactions.detail


def test_overdue(settings: Settings, engine: Engine, world: World) -> None:
    """Doctor reports follow-ups overdue by more than a lease and a tick, with advice."""
    world.follow_up(due=-timedelta(minutes=2))
    backlog = found(settings, engine)["backlog"]
    assert backlog.detail.startswith("1 pending, 0 in flight, 1 overdue, the oldest by 2 min")
    assert "start more workers" in backlog.advice


def test_lost_and_unknown_attempts(settings: Settings, engine: Engine, world: World) -> None:
    """If attempts were lost or unanswered in the last hour, doctor reports them and gives advice."""
    follow_up = world.follow_up(due=timedelta(hours=1))
    for outcome, ago in (("lost", "1 min"), ("lost", "2 h"), ("unknown", "1 min"), ("unknown", "2 min")):
        world.sql(
            "INSERT INTO failed_attempts (follow_up_id, number, at, outcome, detail)"
            " VALUES (:id, 1, now() - CAST(:ago AS interval), :outcome, '')",
            id=follow_up,
            ago=ago,
            outcome=outcome,
        )
    attempts = found(settings, engine)["attempts"]
    assert "1 lost with their workers" in attempts.detail
    assert "2 without an answer" in attempts.detail


@pytest.mark.parametrize(
    ("statuses", "sent", "advice"),
    [
        ([401] * 5, False, True),
        ([500, *[403] * 5], False, True),
        ([401] * 5, True, False),
        ([401] * 4, False, False),
        ([*[401] * 5, 500], False, False),
        ([], False, False),
    ],
)
def test_every_message_is_refused(
    settings: Settings, engine: Engine, world: World, statuses: list[int], *, sent: bool, advice: bool
) -> None:
    """If the endpoint has refused all recent messages, doctor advises to replace the secret."""
    follow_up = world.follow_up(due=timedelta(hours=1))
    for status in statuses:
        world.sql(
            "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail, status_code)"
            " VALUES (:id, 1, 'rejected', '', :status)",
            id=follow_up,
            status=status,
        )
    if sent:
        world.sql("UPDATE follow_ups SET status = 'sent', finished_at = now()")
    assert ("replace FOLLOWUPS_TRANSPORT_SECRET" in found(settings, engine)["attempts"].advice) is advice


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("connects", [True, False])
def test_checks_on_request(settings: Settings, engine: Engine, world: World, *, asks: bool, connects: bool) -> None:
    """The workers are checked only on request, and the endpoint only in a process that may connect to it."""
    assert world
    findings = checks.run(settings, engine, dict if asks else None, connects=connects)
    expected = {name for name, checked in (("workers", asks), ("transport", connects)) if checked}
    assert {"transport", "workers"} & {one.name for one in findings} == expected


def test_open_transaction(settings: Settings, engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor reports a transaction that stays open too long, and the command that ends it."""
    assert world
    monkeypatch.setattr(database_checks, "LONG_TRANSACTION", timedelta(0))
    with engine.connect() as holder:
        pid = holder.scalar(text("SELECT pg_backend_pid()"))
        transactions = found(settings, engine)["transactions"]
    assert f"pid {pid}" in transactions.detail
    assert transactions.advice.endswith(f"SELECT pg_terminate_backend({pid}).")


def test_clock(settings: Settings, engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor reports a host's wrong clock, although follow-ups do not depend on that clock."""
    assert world
    monkeypatch.setattr(database_checks, "CLOCK_OFF", timedelta(microseconds=-1))
    clock = found(settings, engine)["clock"]
    assert "the database's clock, by which follow-ups are sent" in clock.detail
    assert clock.advice


def of(settings: Settings, name: str) -> Finding:
    """Return doctor's finding with the given name about the broker."""
    return next(finding for finding in of_broker(settings) if finding.name == name)


def test_queues(settings: Settings) -> None:
    """If too many hints or ticks are queued, doctor's check fails."""
    assert of(settings, "queues").detail == "0 batches in deliver, 0 ticks in dispatch"
    with redis.Redis.from_url(settings.broker_url.get_secret_value()) as client:
        client.rpush("followups:dispatch", *range(broker_checks.UNREAD_TICKS + 1))
    unread = of(settings, "queues")
    assert unread.detail == "0 batches in deliver, 101 ticks in dispatch"
    assert "start workers" in unread.advice


def test_breaker(settings: Settings) -> None:
    """Doctor reports an open breaker with advice, and a recovering breaker without advice."""
    assert of(settings, "breaker").detail == "closed: no workspace is deferred"

    async def told(*reports: tuple[int, bool]) -> None:
        store = BreakerStore(settings, settings.transport)
        for failed, succeeded in reports:
            runs = (WorkspaceOutcomes(1, failed, after_success=succeeded),)
            await store.report(OutcomeReport(tuple(uuid4() for _ in range(failed)), succeeded, runs), 0)
        await store.close()

    asyncio.run(told((settings.breaker_failures, False)))
    left_alone = of(settings, "breaker")
    assert left_alone.detail.startswith("open for ")
    assert "Repair the chat server" in left_alone.advice
    asyncio.run(told((0, True)))
    recovering = of(settings, "breaker")
    assert recovering.detail.startswith("recovering for ")
    assert recovering.ok


def test_pauses(settings: Settings, engine: Engine, world: World) -> None:
    """For each pause, doctor reports how many follow-ups the pause holds."""
    assert found(settings, engine)["pauses"].detail == "nothing is paused"
    with engine.begin() as connection:
        pauses.pause(connection, PauseScope(world.workspace_id, None))
    world.follow_up()
    world.sql("UPDATE follow_ups SET pause_id = (SELECT id FROM pauses)")
    assert found(settings, engine)["pauses"].detail == "1, which hold 1: followups pause --list"


def test_unreachable_broker(settings: Settings) -> None:
    """Doctor reports an unreachable broker as a single finding and does not fail."""
    away = settings.model_copy(update={"broker_url": type(settings.broker_url)("redis://127.0.0.1:9/0")})
    assert [finding.advice for finding in of_broker(away)] == ["Repair the broker first."]


@pytest.fixture
def matrix(settings: Settings) -> Settings:
    """Return the settings with the transport ``matrix``."""
    return settings.model_copy(update={"transport": "matrix"})


def test_shared_rooms(matrix: Settings, engine: Engine, world: World) -> None:
    """Doctor names each shared Matrix room and a chat of each of its workspaces, and gives advice."""
    others = [World(engine)]
    shared = {each.workspace_id: each.chat(external_id="!shared:example.org") for each in (world, *others)}
    for each in (world, *others):
        each.chat(external_id="49301234567")  # no room
        each.chat()
    world.chat(external_id="!own:example.org")
    world.chat(external_id="!own:example.org")
    for room in ("!own:example.org", "!shared:example.org"):
        World(engine).chat(external_id=room, removed_at=text("now()"))
    (finding,) = of_rooms(matrix, engine)
    chats = ", ".join(f"chat {shared[workspace]} of {workspace}" for workspace in sorted(shared, key=str))
    assert finding.name == "rooms"
    assert finding.detail.endswith(f"so messages to it are rejected: !shared:example.org ({chats})")
    assert "followups chat delete ID --workspace NAME" in finding.advice
    for each in others:
        each.sql("UPDATE chats SET removed_at = now() WHERE workspace_id = :id", id=each.workspace_id)
    (finding,) = of_rooms(matrix, engine)
    assert (finding.detail, finding.ok) == ("no Matrix room is shared by several workspaces", True)


def test_many_shared_rooms(matrix: Settings, engine: Engine, world: World) -> None:
    """Doctor names only some of many shared rooms."""
    other = World(engine)
    for number in range(5):
        for each in (world, other):
            each.chat(external_id=f"!{number}:example.org")
    (finding,) = of_rooms(matrix, engine)
    assert finding.detail.count(":example.org (chat ") == database_checks.SHOWN
    assert finding.detail.endswith(") ...")


def test_rooms_of_other_transports(settings: Settings, engine: Engine, world: World) -> None:
    """Under other transports, several workspaces may use the same external id, so doctor does not check rooms."""
    for each in (world, World(engine)):
        each.chat(external_id="!shared:example.org")
    assert list(of_rooms(settings, engine)) == []


def test_rooms_of_an_unreachable_database(matrix: Settings) -> None:
    """If the database is unreachable, doctor reports that the rooms were not checked."""
    away = make_engine("postgresql://127.0.0.1:9/chats")
    (finding,) = of_rooms(matrix, away)
    away.dispose()
    assert (finding.detail, finding.advice) == ("not checked: connection refused", "Repair the database first.")
