"""The statements that lease what is due: in the order in which it falls due, or shared out between workspaces.

While all that is due fits into the window of what may be in flight, the order of the due dates is fair by itself,
and costs least. Behind a backlog it is not: whoever has a hundred thousand that are overdue would stand in front
of everybody else. So then the places that come free go to the workspaces that have the fewest in flight.

Each is one guarded statement: what somebody holds is passed over, not waited for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from followups.store.fragments import DUE
from followups.store.leases import Lease, lane_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy import Connection, Row


@dataclass(frozen=True, slots=True)
class Claimed:
    """A claimed row; ``lost`` when its last lease ended with an attempt in flight (number ``attempts + 1``)."""

    lease: Lease
    lost: bool
    attempts: int
    losses: int
    cancel_requested: str | None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What a claim looks for: what falls due within ``ahead``, but not what fell due before ``since``.

    It leases up to ``most`` for ``lease``, so that no more than ``window`` are in flight.
    """

    ahead: timedelta
    lease: timedelta
    window: int
    most: int
    since: datetime | None = None


LOW_WATER_MARGIN = timedelta(seconds=10)
"""For what is created for now, or put off by a moment, and committed a little later."""

FEW = 4
"""How many that are free a fair claim looks at in each workspace at least, however many workspaces there are."""

_PENDING = "f.status = 'pending' AND f.waits_for IS NULL"
_FREE = "f.lease_until IS NULL OR f.lease_until <= now()"
_HORIZON = "now() + CAST(:ahead AS interval)"
_SINCE = "COALESCE(CAST(:since AS timestamptz), '-infinity')"

# Whatever was looked at: ``head`` has it in the order in which it is to be taken; ``looked`` says in one row how many
# of it are leased, when the first falls due, and whether there is more of it.
_TAKE = f"""
    taken AS MATERIALIZED (
        SELECT f.id, f.begun_at IS NOT NULL AS lost
          FROM head
         CROSS JOIN LATERAL (
             SELECT f.id, f.begun_at FROM follow_ups f
              WHERE f.id = head.id AND {_PENDING}
                AND {DUE} <= {_HORIZON} AND ({_FREE})
                FOR NO KEY UPDATE SKIP LOCKED
         ) f
         WHERE head.free
         LIMIT LEAST(:most, GREATEST(0, :window - (SELECT leased FROM looked)))
    ), claimed AS (
        UPDATE follow_ups f
           SET lease_token = f.lease_token + 1,
               lease_until = GREATEST(now(), {DUE}) + CAST(:lease AS interval),
               begun_at = NULL,
               attempts = f.attempts - taken.lost::int,
               losses = f.losses + taken.lost::int
          FROM taken
         WHERE f.id = taken.id
        RETURNING f.id, f.lease_token, {DUE} AS due, taken.lost, f.attempts, f.losses, f.cancel_requested,
                  f.traceparent, f.workspace_id
    )
    SELECT claimed.*, looked.leased, looked.unseen,
           LEAST(looked.first, now()) - CAST(:margin AS interval) AS low_water
      FROM looked LEFT JOIN claimed ON true
     ORDER BY claimed.due, claimed.id
"""  # noqa: S608 - no input, only the constants above

# Rows in flight are the first of the index, but for what came in behind with an earlier due date. Looking at
# no more than :seen_most rows bounds what a tick costs. Where there is more, some that are leased may stand behind it,
# as a fair claim left them: so nothing is taken then.
_IN_ORDER = text(f"""
    WITH head AS MATERIALIZED (
        SELECT f.id, {DUE} AS due, {_FREE} AS free
          FROM follow_ups f
         WHERE {_PENDING} AND {DUE} <= {_HORIZON} AND {DUE} >= {_SINCE}
         ORDER BY {DUE}, f.id
         LIMIT :seen_most
    ), looked AS MATERIALIZED (
        SELECT CASE WHEN count(*) < :seen_most THEN count(*) FILTER (WHERE NOT free) ELSE :window END AS leased,
               min(due) AS first, count(*) >= :seen_most AS unseen
          FROM head
    ), {_TAKE}
""")  # noqa: S608 - no input, only the constants above


def _first_rows(behind: str, most: str) -> str:
    """Return a query for what is due in a ``workspace``, from behind a place in the index on.

    It reads on until it has seen ``most`` rows, and as many that are free. Its own rows are the free ones, and the last
    that it has seen; ``number`` says the how manieth each is of all, and ``free_number`` of the free: what is between
    the two is leased. Workspace and due date are compared as one, and so is their order: one index has it.
    """
    return f"""
        SELECT one.* FROM (
            SELECT f.id, {DUE} AS due, {_FREE} AS free, row_number() OVER due_order AS number,
                   count(*) FILTER (WHERE {_FREE}) OVER due_order AS free_number,
                   lead(f.id) OVER due_order IS NULL AS last
              FROM follow_ups f
             WHERE {_PENDING} AND (f.workspace_id, {DUE}, f.id) > {behind}
               AND (f.workspace_id, {DUE}) <= (workspace.id, {_HORIZON})
            WINDOW due_order AS (ORDER BY f.workspace_id, {DUE}, f.id ROWS UNBOUNDED PRECEDING)
        ) one
         WHERE one.last OR one.free AND one.free_number <= LEAST(:most, {most})
            OR one.free_number >= LEAST(:most, {most}) AND one.number >= {most}
         LIMIT LEAST(:most, {most}) + 1
    """  # noqa: S608 - no input, only constants


WITHOUT_SORTING = text(
    "SELECT set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true)"
)
"""For a fair claim: of a table that it takes for almost empty the planner would rather read and sort all that is
pending, and that for each workspace, than follow the index that has it in order. Measured right after an insert of
30,000 rows: 311 ms, and with a thousand workspaces beside more than 10 s."""

_LOWEST_ID = "'00000000-0000-0000-0000-000000000000'::uuid"
_FIRST_ROWS = _first_rows(f"(workspace.id, {_SINCE}, {_LOWEST_ID})", "(SELECT rows FROM share)")
_FURTHER_ROWS = _first_rows("(workspace.id, workspace.due, workspace.last_id)", "(SELECT rows FROM rest)")

# Two looks: first an equal share of what a claim may look at for each workspace, then what the others left of the
# places for those that have more. So many workspaces cost a few rows each, and one that has much beside a thousand
# that have little fills the window all the same. A row's place is how many of its workspace would be in flight with
# it; the lowest are taken first, and among these the earliest. What a workspace has in flight behind more free rows
# than are looked at is not counted: they came in with an earlier due date, or their leases ran out. They are the first
# to be taken, so that such a claim goes beyond the window once, by its own size at most, and the next one counts all.
_FAIRLY = text(f"""
    WITH workspace AS MATERIALIZED (
        SELECT w.id, f.due FROM workspaces w
         CROSS JOIN LATERAL (
             SELECT {DUE} AS due FROM follow_ups f
              WHERE {_PENDING} AND (f.workspace_id, {DUE}) >= (w.id, {_SINCE})
                AND (f.workspace_id, {DUE}) <= (w.id, {_HORIZON})
              ORDER BY f.workspace_id, {DUE}, f.id
              LIMIT 1
         ) f
    ), share AS MATERIALIZED (
        SELECT GREATEST(:few, :seen_most / GREATEST(count(*), 1)) AS rows FROM workspace
    ), first_look AS MATERIALIZED (
        SELECT workspace.id AS workspace_id, one.* FROM workspace CROSS JOIN LATERAL ({_FIRST_ROWS}) one
    ), first_count AS MATERIALIZED (
        SELECT workspace_id AS id, max(number) AS number, max(free_number) AS free_number, bool_or(last) AS whole,
               (array_agg(due ORDER BY number DESC))[1] AS due, (array_agg(id ORDER BY number DESC))[1] AS last_id
          FROM first_look
         GROUP BY workspace_id
    ), rest AS MATERIALIZED (
        SELECT ceil((LEAST(:most, :window - sum(number - free_number)) - sum(free_number))
                    / NULLIF(count(*) FILTER (WHERE NOT whole), 0))::bigint AS rows
          FROM first_count
    ), second_look AS MATERIALIZED (
        SELECT workspace.id AS workspace_id, one.id, one.due, one.free, workspace.number + one.number AS number,
               workspace.free_number + one.free_number AS free_number, one.last
          FROM first_count workspace CROSS JOIN LATERAL ({_FURTHER_ROWS}) one
         WHERE NOT workspace.whole AND (SELECT rows FROM rest) > 0
    ), found AS MATERIALIZED (
        SELECT * FROM first_look UNION ALL SELECT * FROM second_look
    ), head AS MATERIALIZED (
        SELECT id, due, free
          FROM (SELECT id, due, free,
                       max(number) OVER mine - max(free_number) OVER mine + free_number AS place
                  FROM found
                WINDOW mine AS (PARTITION BY workspace_id)) placed
         WHERE free
         ORDER BY place, due, id
    ), looked AS MATERIALIZED (
        SELECT COALESCE(sum(leased), 0) AS leased, (SELECT min(due) FROM workspace) AS first,
               COALESCE(bool_or(NOT whole), false) AS unseen
          FROM (SELECT max(number) - max(free_number) AS leased, bool_or(last) AS whole
                  FROM found GROUP BY workspace_id) counted
    ), {_TAKE}
""")  # noqa: S608 - no input, only the constants above


def claim(connection: Connection, look: Look) -> tuple[list[Claimed], bool, datetime]:
    """Lease what is looked for, the earliest due first; expired leases are taken over.

    The second value says that there may be more, as the claim or the window was full: then `claim_fairly` should
    come next. The third is the low-water mark: all that was due before it had ended, but for what comes in behind.
    """
    rows = connection.execute(_IN_ORDER, _parameters(look)).all()
    return claim_fairly(connection, look) if rows[0].unseen else _told(rows, look)


def claim_fairly(connection: Connection, look: Look) -> tuple[list[Claimed], bool, datetime]:
    """Lease the same, first for the workspaces with the fewest in flight; of each workspace the earliest due first."""
    connection.execute(WITHOUT_SORTING)
    return _told(connection.execute(_FAIRLY, _parameters(look) | {"few": FEW}).all(), look)


def _parameters(look: Look) -> dict[str, object]:
    return asdict(look) | {"seen_most": look.window + look.most, "margin": LOW_WATER_MARGIN}


def _told(rows: Sequence[Row[Any]], look: Look) -> tuple[list[Claimed], bool, datetime]:
    claimed = [
        Claimed(
            Lease(row.id, row.lease_token, row.due, row.losses, lane_of(row.workspace_id)),
            row.lost,
            row.attempts,
            row.losses,
            row.cancel_requested,
            row.traceparent,
        )
        for row in rows
        if row.id is not None
    ]
    summary = rows[0]
    full = len(claimed) >= look.most or summary.leased + len(claimed) >= look.window
    return claimed, full or summary.unseen, summary.low_water
