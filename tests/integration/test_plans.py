"""Even among many pending follow-ups, the claim, begin and settle statements use index look-ups.

The plans of the API's lists are tested in `test_store_listing.py`.
"""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from cursors import intercepted
from followups.database import make_engine
from followups.delivery import dispatcher
from followups.delivery.attempts import Attempt
from followups.delivery.begin import begin
from followups.delivery.claim import claim, claim_fairly
from followups.delivery.dispatcher import Dispatcher
from followups.delivery.settle import settle
from followups.session_settings import BY_KEY, ONCE_PLANNED
from followups.store import claims, leases, rate_limits
from followups.transports.port import Rejected, Retry, Sent
from followups.uptime import uptime
from foreign import set_defaults
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine

    from followups.delivery.attempts import Begun
    from followups.settings import Settings
    from followups.store.leases import Lease

DUE = 300
MOST = 12 * DUE
"""Maximum number of `follow_ups` rows read for a batch: twelve for each due follow-up."""

PORTION = 100_000
"""Number of rows per INSERT, small enough for the statement timeout."""

OTHERS = """
    WITH chat AS (
        INSERT INTO chats (workspace_id, id, last_message_id, last_message_role, last_message_at)
        SELECT :workspace_id, gen_random_uuid(), gen_random_uuid(), 'agent', now() FROM generate_series(1, :count)
        RETURNING workspace_id, id, last_message_id
    )
    INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id)
    SELECT workspace_id, id, 'Later', now() + interval '30 days' + random() * interval '300 days', last_message_id
      FROM chat
"""


@contextmanager
def statements(engine: Engine) -> Iterator[list[tuple[str, Any]]]:
    """Record every statement that touches follow-ups, with its parameters."""
    seen: list[tuple[str, Any]] = []

    def record(statement: str, parameters: Any) -> str:
        if "follow_ups" in statement and not statement.startswith("EXPLAIN"):
            seen.append((statement, parameters))
        return statement

    with intercepted(engine, record):
        yield seen


def read(plan: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the scan type of each plan node that reads follow-ups or chats.

    If the plan was executed, also yield how many rows were read.
    """
    if plan.get("Relation Name") in {"follow_ups", "chats"} and "Scan" in plan["Node Type"]:
        looked_at = plan.get("Actual Rows", 0) + plan.get("Rows Removed by Filter", 0)
        yield plan["Node Type"], looked_at * plan.get("Actual Loops", 0)
    for child in plan.get("Plans", []):
        yield from read(child)


def looked_up(plan: dict[str, Any]) -> Iterator[str]:
    """Yield the indexes that the plan uses to look up follow-ups by id alone."""
    if plan.get("Relation Name") == "follow_ups" and plan.get("Index Cond", "").startswith("(id = "):
        yield plan["Index Name"]
    for child in plan.get("Plans", []):
        yield from looked_up(child)


@pytest.mark.parametrize("others", [20_000, pytest.param(1_000_000, marks=pytest.mark.large)])
@pytest.mark.parametrize("analyzed", [True, False], ids=["analyzed", "new"])
def test_plans(world: World, engine: Engine, settings: Settings, others: int, *, analyzed: bool) -> None:
    """Claim, begin and settle read only the rows they need, even before the first ANALYZE."""
    for portion in range(0, others, PORTION):
        world.sql(OTHERS, workspace_id=world.workspace_id, count=min(PORTION, others - portion))
    world.burst([timedelta(0)] * DUE)
    if analyzed:
        _analyze(engine)
    for statement in _go(engine, settings):
        _by_key_whatever_the_batch(engine, statement)


def test_plans_when_nothing_was_pending(world: World, engine: Engine, settings: Settings) -> None:
    """Even if the planner expects no pending rows, it does not use the index of pending rows.

    If no row is pending during a vacuum, the planner considers this index empty.
    """
    world.burst([timedelta(0)] * 2000)
    world.sql("UPDATE follow_ups SET status = 'sent', finished_at = now()")
    _analyze(engine)
    world.burst([timedelta(0)] * DUE)
    _go(engine, settings)


def _go(engine: Engine, settings: Settings) -> list[str]:
    """Run claim, begin and settle, check each plan, and return the statements of the pipeline."""
    way = StepValues(engine, settings)
    of_the_pipeline: list[str] = []
    for step in (way.claim, way.limit, way.begin, way.settle):
        with statements(engine) as seen:
            step()
        assert seen
        for statement, parameters in seen:
            _by_key(engine, statement, parameters)
        if step != way.claim:
            of_the_pipeline += [statement for statement, _ in seen]
    return of_the_pipeline


@dataclass
class StepValues:
    """The values that one delivery step passes to the next."""

    engine: Engine
    settings: Settings
    leases: tuple[Lease, ...] = ()
    begun: tuple[Begun, ...] = ()

    def claim(self) -> None:
        self.leases = claim(self.engine, self.settings).leases
        assert len(self.leases) == DUE

    def limit(self) -> None:
        with self.engine.begin() as connection:
            places = rate_limits.limitable(connection, self.leases, self.settings.max_lateness)
            put_off = rate_limits.defer_if_leased(connection, [(one, timedelta(minutes=1)) for one in self.leases])
            connection.rollback()
        assert len(places) == len(put_off) == DUE

    def begin(self) -> None:
        self.begun = begin(self.engine, self.settings, self.leases).begun
        assert len(self.begun) == DUE

    def settle(self) -> None:
        outcomes = [Sent(None), Retry("HTTP 500"), Rejected("HTTP 403")]
        attempts = [Attempt(begun, outcomes[number % 3], 0.0, uptime(), 0.0) for number, begun in enumerate(self.begun)]
        settle(self.engine, self.settings, attempts)


LIGHT, EACH = 20, 3
"""The number of workspaces without a backlog, and the number of due follow-ups in each."""


@pytest.mark.parametrize("others", [20_000, pytest.param(1_000_000, marks=pytest.mark.large)])
@pytest.mark.parametrize("statistics", ["none", "of before", "true"])
def test_plan_of_a_fair_claim(world: World, engine: Engine, settings: Settings, statistics: str, others: int) -> None:
    """A fair claim scans one index, separately for each workspace.

    The scan reads only due follow-ups within the workspace's share.
    """
    for portion in range(0, others, PORTION):
        world.sql(OTHERS, workspace_id=world.workspace_id, count=min(PORTION, others - portion))
    if statistics == "of before":
        _analyze(engine)
    world.burst([timedelta(0)] * DUE * 20)
    for _ in range(LIGHT):
        light = World(engine)
        light.burst([timedelta(0)] * EACH)
        light.sql(OTHERS, workspace_id=light.workspace_id, count=100)
    if statistics == "true":
        _analyze(engine)
    bounded = settings.model_copy(update={"max_in_flight": DUE})
    for expected in (DUE, 0):
        with statements(engine) as seen:
            assert len(claim_fairly(engine, bounded).leases) == expected
        (fairly,) = [(statement, parameters) for statement, parameters in seen if "first_look" in statement]
        _by_key(engine, *fairly, without_sorting)


@pytest.mark.parametrize("each", [0, 1], ids=["nothing pending", "one for later"])
def test_idle_workspaces_are_not_searched(engine: Engine, settings: Settings, each: int) -> None:
    """Even with 300 idle workspaces, a fair claim needs few index scans."""
    for _ in range(2):
        World(engine).burst([timedelta(0)] * 3)
    with engine.begin() as connection:
        connection.execute(text(IDLE), {"count": 300, "each": each})
    with statements(engine) as seen:
        assert len(claim_fairly(engine, settings).leases) == 6
    (fairly,) = [(statement, parameters) for statement, parameters in seen if "first_look" in statement]
    with engine.connect() as connection:
        without_sorting(connection)
        plan = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {fairly[0]}", fairly[1]).scalar_one()[0]
        connection.rollback()
    assert sum(scans(plan["Plan"])) <= 30


def scans(plan: dict[str, Any]) -> Iterator[int]:
    """Yield the number of executions of each table scan in a plan."""
    if "Relation Name" in plan and plan["Node Type"] != "ModifyTable":
        yield plan["Actual Loops"]
    for child in plan.get("Plans", []):
        yield from scans(child)


IDLE = """
    WITH idle AS (
        INSERT INTO workspaces (id, name)
        SELECT id, id::text FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, :count)) new
        RETURNING id
    ), chat AS (
        INSERT INTO chats (workspace_id, id, last_message_id, last_message_role, last_message_at)
        SELECT idle.id, gen_random_uuid(), gen_random_uuid(), 'agent', now() FROM idle, generate_series(1, :each)
        RETURNING workspace_id, id, last_message_id
    )
    INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id)
    SELECT workspace_id, id, 'Later', now() + interval '1 day', last_message_id FROM chat
"""


def without_sorting(connection: Connection) -> None:
    """Set the same planner options as a fair claim."""
    connection.execute(claims.WITHOUT_SORTING)


def _analyze(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) follow_ups"))
        connection.execute(text("VACUUM (ANALYZE) chats"))


def _by_key(
    engine: Engine, statement: str, parameters: Any, prepare: Callable[[Connection], None] = lambda _: None
) -> None:
    with engine.connect() as connection:
        prepare(connection)
        found = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()
        connection.rollback()
    for way, rows in read(found[0]["Plan"]):
        assert way in SCANS, (way, statement)
        assert rows <= MOST, (rows, statement)
    assert set(looked_up(found[0]["Plan"])) <= {"pk_follow_ups"}, statement


SCANS = {"Index Scan", "Index Only Scan", "Tid Scan"}
"""Scans that find rows through an index or by location."""
PARAMETER = re.compile(r"%\((\w+)\)s")


def _by_key_whatever_the_batch(engine: Engine, statement: str) -> None:
    """Check the plan of a statement that is planned once for batches of all sizes (`ONCE_PLANNED`)."""
    names = list(dict.fromkeys(PARAMETER.findall(statement)))
    numbered = PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", statement)
    with engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {numbered}").scalar_one()[0]["Plan"]
    assert {way for way, _ in read(plan)} <= SCANS, statement
    assert set(looked_up(plan)) <= {"pk_follow_ups"}, statement


def test_a_server_without_the_wanted_scans(database_url: str) -> None:
    """A worker's sessions switch on the plan methods that they need, even if the database's defaults are off."""
    names = ["enable_indexscan", "enable_indexonlyscan", "enable_tidscan", "enable_nestloop"]
    set_defaults(database_url, dict.fromkeys(names, "off"))
    engine = make_engine(database_url, pool_size=1, options=BY_KEY)
    with engine.connect() as connection:
        assert {connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names} == {"on"}
    engine.dispose()


def test_begin_with_an_old_plan(world: World, database_url: str, engine: Engine, settings: Settings) -> None:
    """If a plan was made when the tables were nearly empty, it still looks up each chat only once."""
    patient = settings.model_copy(update={"lease": timedelta(minutes=1)})
    rules = leases.Rules(patient.lease, patient.max_lateness, early=timedelta(seconds=1))
    prepared = make_engine(database_url, pool_size=1, options=ONCE_PLANNED)
    with prepared.connect() as connection:
        world.burst([timedelta(0)] * 30)
        for lease in claim(engine, patient).leases:
            assert leases.begin_if_leased(connection, [lease], rules)
            connection.commit()
        world.burst([timedelta(0)] * DUE * 5)
        batch = claim(engine, patient).leases[:100]
        assert len(leases.begin_if_leased(connection, batch, rules)) == len(batch)
        read = "SELECT COALESCE(idx_tup_fetch, 0) + seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'chats'"
        assert connection.execute(text(read)).scalar_one() <= 2 * len(batch)
    prepared.dispose()


@pytest.mark.parametrize(("slow", "many"), [(0.0, DUE + 1), (60.0, DUE)], ids=["slow", "many"])
def test_a_burst_into_a_table_estimated_as_empty(
    world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, slow: float, many: int
) -> None:
    """A slow or large claim updates the planner's statistics, so later plans use indexes."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) follow_ups"))
    world.burst([timedelta(0)] * DUE)
    assert world.scalar("SELECT reltuples FROM pg_class WHERE relname = 'follow_ups'") < DUE
    monkeypatch.setattr(dispatcher, "SLOW", slow)
    monkeypatch.setattr(dispatcher, "MANY", many)
    beaten = Dispatcher(settings, engine, lambda _: None)
    beaten.start()
    beaten.tick()
    wait_until(lambda: world.scalar("SELECT reltuples FROM pg_class WHERE relname = 'follow_ups'") == DUE)
    beaten.stop()


def test_stop_waits_for_the_update_of_statistics(
    world: World, engine: Engine, settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a dispatcher stops, it finishes a running update of the planner's statistics.

    A stop closes the dispatcher's database engine, which the update still needs.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) follow_ups"))
    world.burst([timedelta(0)] * DUE)
    monkeypatch.setattr(dispatcher, "MANY", DUE)
    looking = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'ANALYZE%'"
    slowly = make_engine(database_url, options={**BY_KEY, "vacuum_cost_delay": "100ms", "vacuum_cost_limit": "1"})
    asking = Dispatcher(settings, slowly, lambda _: None)
    asking.start()
    asking.tick()
    wait_until(lambda: world.scalar(looking))
    asking.stop()
    assert not world.scalar(looking)
    assert "statistics" not in {thread.name for thread in threading.enumerate()}
    slowly.dispose()
