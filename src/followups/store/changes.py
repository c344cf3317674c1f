"""Detection of changes to a workspace or a follow-up, cheap enough for one query per second.

After each change to a topic, `read_values` returns a new value for the topic. If there are very many follow-ups, a
change that does not alter a follow-up's state may be missed. The console's pages therefore also reload from time to
time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import text

from followups.store.leases import uuid_array

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Engine

Topic = tuple[str, UUID | None]
"""A pair: ``workspace`` and its id (None means all workspaces), or ``follow_up`` and its id."""

TopicValues = dict[Topic, str]

RECENT = 1_000
"""Number of recently finished follow-ups that are read to detect changes."""

_NEWEST = ", ".join(
    f"""(SELECT f.created_at FROM follow_ups f
          WHERE f.workspace_id = v.id AND f.status = '{status}' ORDER BY f.created_at DESC, f.id LIMIT 1)"""  # noqa: S608 - no input
    for status in ("pending", "sent", "failed", "cancelled")
)
_WORKSPACES = text(f"""
    WITH ended AS MATERIALIZED (
        SELECT workspace_id, max(finished_at) AS last
          FROM (SELECT workspace_id, finished_at FROM follow_ups WHERE finished_at IS NOT NULL
                 ORDER BY finished_at DESC LIMIT {RECENT}) recent
         GROUP BY workspace_id)
    SELECT v.id, CAST(ROW({_NEWEST}, ended.last,
           (SELECT a.at FROM audit_events a WHERE a.workspace_id = v.id ORDER BY a.at DESC, a.id DESC LIMIT 1),
           (SELECT CAST(sum(b.done) AS text) || count(*) FROM bulk_actions b
             WHERE b.finished_at IS NULL AND b.workspace_id = v.id)) AS text) AS value
      FROM unnest(CAST(:ids AS uuid[])) AS v(id)
      LEFT JOIN ended ON ended.workspace_id = v.id
""")  # noqa: S608 - no input
_ALL = text("""
    SELECT CAST(ROW((SELECT max(finished_at) FROM follow_ups WHERE finished_at IS NOT NULL),
           (SELECT count(*) FROM (SELECT FROM follow_ups WHERE status = 'pending' LIMIT 10001) AS found),
           (SELECT max(at) FROM audit_events),
           (SELECT CAST(sum(done) AS text) || count(*) FROM bulk_actions WHERE finished_at IS NULL)) AS text)
""")
_FOLLOW_UPS = text("""
    SELECT id, CAST(ROW(updated_at, status, attempts, snoozes, losses, begun_at, next_attempt_at, waits_for) AS text)
               AS value
      FROM follow_ups WHERE id = ANY(CAST(:ids AS uuid[]))
""")


def read_values(engine: Engine, topics: Iterable[Topic]) -> TopicValues:
    """Return a value for each topic, which changes whenever the topic's data changes."""
    wanted = list(topics)
    workspaces = [own for kind, own in wanted if kind == "workspace" and own is not None]
    follow_ups = [own for kind, own in wanted if kind == "follow_up" and own is not None]
    seen: TopicValues = {}
    with engine.connect() as connection:
        if workspaces:
            rows = connection.execute(_WORKSPACES, {"ids": uuid_array(workspaces)})
            seen |= {("workspace", row.id): row.value for row in rows}
        if ("workspace", None) in wanted:
            seen[("workspace", None)] = connection.execute(_ALL).scalar_one()
        if follow_ups:
            rows = connection.execute(_FOLLOW_UPS, {"ids": uuid_array(follow_ups)})
            seen |= {("follow_up", row.id): row.value for row in rows}
    return seen
