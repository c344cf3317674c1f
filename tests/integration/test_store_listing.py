"""Tests of pages of follow-ups: for each filter, the query uses an index at any table size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from followups.database import make_engine
from followups.statements import COLUMNS
from followups.states import Status
from followups.store import listing
from followups.store.listing import ListFilter
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

ROWS = 100_000
WORKSPACES = 100

_FILL = (
    f"INSERT INTO workspaces (name) SELECT 'w' || i FROM generate_series(1, {WORKSPACES}) i",  # noqa: S608
    "INSERT INTO chats (workspace_id, id) SELECT w.id, gen_random_uuid() FROM workspaces w, generate_series(1, 20)",
    # One workspace in a hundred owns half of the rows. One row in fifty is pending.
    f"""
    WITH places AS MATERIALIZED (
        SELECT c.workspace_id, c.id, row_number() OVER (ORDER BY w.name, c.id) AS n
          FROM chats c JOIN workspaces w ON w.id = c.workspace_id)
    INSERT INTO follow_ups (workspace_id, chat_id, due_date, message, status, finished_at, chat_message_id,
                            trigger_chat_message_id, created_at)
    SELECT p.workspace_id, p.id, now(), 'x', CASE WHEN i % 50 = 0 THEN 'pending' ELSE 'sent' END,
           CASE WHEN i % 50 <> 0 THEN now() END, CASE WHEN i % 50 <> 0 THEN gen_random_uuid() END, gen_random_uuid(),
           now() - i * interval '1 s'
      FROM generate_series(1, {ROWS}) i
      JOIN places p ON p.n = CASE WHEN i % 2 = 0 THEN 1 + i % 20 ELSE 1 + i % {WORKSPACES * 20} END
    """,  # noqa: S608 - constants of this file
    "ANALYZE",
)


@pytest.fixture
def filled(database_url: str) -> Iterator[Engine]:
    """Return an engine for a database with many follow-ups and the planner's default options."""
    engine = make_engine(database_url)
    with engine.begin() as connection:
        for statement in _FILL:
            connection.execute(text(statement))
    yield engine
    engine.dispose()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every node of a query plan."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def examined(engine: Engine, workspace_id: UUID | None, wanted: ListFilter, most: int) -> tuple[set[str], float]:
    """Run a page's query; return how it scans `follow_ups`, and how many rows it reads."""
    statement, parameters = listing.statement_of(workspace_id, wanted)
    statement = statement.replace(COLUMNS, "follow_ups.*")
    parameters |= {"offset": most - 11, "size": 11, "most": most}
    with engine.connect() as connection:
        plan = connection.execute(text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"), parameters).scalar_one()
    read = [node for node in nodes(plan[0]["Plan"]) if node.get("Relation Name") == "follow_ups"]
    rows = sum((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"] for node in read)
    return {node["Node Type"] for node in read}, rows


INDEX_SCANS = {"Index Scan", "Index Only Scan"}


def test_every_list_uses_an_index(filled: Engine) -> None:
    """Every combination of filters uses an index and reads about one page of follow-ups."""
    largest = "SELECT workspace_id FROM follow_ups GROUP BY 1 ORDER BY count(*) DESC LIMIT 1"
    with filled.connect() as connection:
        row = connection.execute(text("SELECT * FROM follow_ups WHERE status = 'sent' LIMIT 1")).one()
        workspaces = {row.workspace_id, connection.execute(text(largest)).scalar_one()}
    for workspace_id in workspaces:
        for wanted in filters_of(row):
            ways, rows = examined(filled, workspace_id, wanted, 11)
            assert ways <= INDEX_SCANS, (wanted, ways)
            # At most 12 rows are read for each of the four states, and then 11 rows for the page.
            assert rows <= 5 * 11 + 4, (wanted, rows)
        # A query for a late page reads all earlier rows, but not their messages.
        ways, rows = examined(filled, workspace_id, ListFilter(statuses=(Status.SENT,)), 10_011)
        assert ways <= INDEX_SCANS
        assert rows <= 10_011 + 11
    # An operator's list reads only the first rows of each workspace.
    ways, rows = examined(filled, None, ListFilter(statuses=(Status.SENT,)), 11)
    assert ways <= INDEX_SCANS
    assert rows <= (WORKSPACES + 1) * 11


def filters_of(row: Any) -> list[ListFilter]:
    """Return filters of every type that match the row, and some that match few rows."""
    chat, message, trigger = (row.chat_id,), (row.chat_message_id,), (row.trigger_chat_message_id,)
    strangers = tuple(uuid4() for _ in range(20))
    return [
        ListFilter(),
        *(ListFilter(statuses=(status,)) for status in Status),
        ListFilter(statuses=(Status.PENDING, Status.FAILED)),
        ListFilter(chat_ids=chat),
        ListFilter(chat_ids=chat + strangers),
        ListFilter(chat_message_ids=message),
        ListFilter(chat_message_ids=message + strangers),
        ListFilter(trigger_chat_message_ids=trigger),
        ListFilter(trigger_chat_message_ids=trigger + strangers),
        ListFilter(chat, message, (Status.SENT,), trigger),
        ListFilter(chat_ids=chat, statuses=(Status.SENT,)),
    ]


def test_pages_contain_everything_once(database_url: str) -> None:
    """Together, the pages of a list contain every follow-up once and in order.

    An operator sees the follow-ups of all workspaces.
    """
    engine = make_engine(database_url)
    worlds = [World(engine), World(engine)]
    rows = [
        worlds[number % 2].row(worlds[number % 2].follow_up(status=status, **ends))
        for number, (status, ends) in enumerate(
            [("pending", {}), ("sent", {"finished_at": text("now()")})] * 4
            + [("failed", {"finished_at": text("now()"), "reason": "too_late"})] * 3
        )
    ]
    with Session(engine) as session:
        for workspace_id in (worlds[0].workspace_id, worlds[1].workspace_id, None):
            found, number, more = [], 1, True
            while more:
                page, more = listing.page(session, workspace_id, ListFilter(), page_number=number, page_size=2)
                found += [one.id for one in page]
                number += 1
            mine = [row for row in rows if workspace_id in {None, row.workspace_id}]
            assert found == [row.id for row in sorted(mine, key=lambda row: (-row.created_at.timestamp(), row.id))]
    engine.dispose()
