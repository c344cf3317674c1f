"""Metrics of the backlog on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event, text

from followups.store import counts

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from world import World

HOUR = timedelta(hours=1)


def test_exact(world: World, engine: Engine) -> None:
    """In a small table, all counts and the age of the oldest overdue follow-up are exact.

    A follow-up that waits for an earlier one in its chat is not overdue.
    """
    chat_id = world.chat()
    first = world.follow_up(chat_id, due=-2 * HOUR, begun_at=text("now()"), lease_until=text("now()"))
    world.follow_up(chat_id, due=-3 * HOUR, waits_for=first)
    world.follow_up(due=-HOUR)
    world.follow_up(due=-4 * HOUR, next_attempt_at=text("now() + interval '1 hour'"))
    world.follow_up(due=HOUR)
    world.follow_up(due=-5 * HOUR, status="sent", finished_at=text("now()"))
    with engine.connect() as connection:
        found = counts.measure_backlog(connection, window=5000)
    assert (found.pending, found.overdue, found.in_flight) == (5, 2, 1)
    assert 7200 <= found.oldest_overdue < 7300


def test_nothing(world: World, engine: Engine) -> None:
    """If there are no follow-ups, every backlog gauge is zero."""
    assert world.scalar("SELECT count(*) FROM follow_ups") == 0
    with engine.connect() as connection:
        assert counts.measure_backlog(connection, window=5000) == counts.Backlog(0, 0, 0.0, 0)


def test_the_table_is_not_read(world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few overdue rows among many are found through an index, without reading the rest."""
    monkeypatch.setattr(counts, "BACKLOG_EXACT_UP_TO", 100)
    world.follow_up(due=HOUR)
    world.sql(
        "INSERT INTO follow_ups (workspace_id, chat_id, due_date, message, trigger_chat_message_id)"
        " SELECT workspace_id, chat_id, now() + i * interval '1 minute', message, trigger_chat_message_id"
        " FROM follow_ups, generate_series(-3, 5000) i"
    )
    world.sql("ANALYZE follow_ups")
    statements: list[tuple[str, object]] = []
    event.listen(engine, "before_cursor_execute", lambda *given: statements.append((given[2], given[3])))
    with engine.connect() as connection:
        assert counts.measure_backlog(connection, window=100).overdue == 4
        statement, parameters = statements[0]
        plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()  # type: ignore[arg-type]
    assert any("ix_follow_ups_due" in line for line in plan)
    assert not [line for line in plan if "Seq Scan" in line]


def test_estimated(world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a large backlog, the planner's estimate is off by at most a fifth."""
    monkeypatch.setattr(counts, "BACKLOG_EXACT_UP_TO", 100)
    world.follow_up(due=-HOUR)
    world.sql(
        "INSERT INTO follow_ups (workspace_id, chat_id, due_date, message, trigger_chat_message_id)"
        " SELECT workspace_id, chat_id, now() + (i - 1000) * interval '1 s', message, trigger_chat_message_id"
        " FROM follow_ups, generate_series(1, 4000) i"
    )
    world.sql("ANALYZE follow_ups")
    with engine.connect() as connection:
        found = counts.measure_backlog(connection, window=5000)
    assert found.pending == pytest.approx(4001, rel=0.2)
    assert found.overdue == pytest.approx(1001, rel=0.2)


@pytest.mark.parametrize("limit", [HOUR, timedelta(milliseconds=1)])
def test_a_limit_ends_with_its_query(engine: Engine, limit: timedelta) -> None:
    """After the backlog query, even if it timed out, the transaction has its previous time limit again."""
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = '7s'"))
        found = counts.within(connection, limit, text("SELECT pg_sleep(0.1)"), {})
        assert (found is None) == (limit < HOUR)
        assert connection.scalar(text("SHOW statement_timeout")) == "7s"
