"""Claims: the statements that lease what is due, in the order of due dates or shared fairly between workspaces.

While everything due fits into the window of what may be in flight, the order of due dates is fair by itself, and
cheapest. Behind a backlog it is not: a workspace with a hundred thousand overdue follow-ups would go first with all of
them. So freed places then go to the workspaces that have the fewest in flight.

Each claim is one guarded statement; it skips rows that another transaction has locked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from followups.store import marks
from followups.store.fragments import DUE, DUE_READ, NEXT_TOKEN
from followups.store.leases import Lease, key_of, uuid_array

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.states import Final


class Lost(NamedTuple):
    """A follow-up claimed after a lost lease, whose attempt had the number ``attempts + 1``."""

    lease: Lease
    attempts: int
    cancel_requested: str | None


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim leased, the earliest due first, and what it found."""

    leases: tuple[Lease, ...]
    lost: tuple[Lost, ...]
    """Those of them with a lost lease: it ran out with an attempt in flight."""
    traced: tuple[tuple[UUID, str], ...]
    """Those of them created in a trace: ids with their ``traceparent``."""
    more: bool
    """Whether more may be due: this claim, or the window of what may be in flight, was full."""
    cut_short: bool
    """Whether another claim now would find more: this one was full, and the window was not."""
    low_water: datetime | None
    """Where the next claim may start, apart from rows that come in with an earlier due date."""
    ended: tuple[tuple[UUID, Final], ...] = ()
    """Those with a lost lease that must not be tried again; they are not among the leases."""
    in_grace: bool = False
    """Whether ended leases with an attempt in flight were left to their workers.

    Another claim takes these leases over shortly.
    """
    busy: bool = False
    """Whether another dispatcher was claiming, so that this claim looked at nothing."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a claim looks for: rows that fall due within ``ahead``, but not before ``since``.

    It leases up to ``most`` for ``lease``, so that no more than ``window`` are in flight.
    """

    ahead: timedelta
    lease: timedelta
    window: int
    most: int
    since: datetime | None = None
    without: tuple[UUID, ...] = ()
    """Follow-ups to skip, since their rows cannot be written."""
    in_grace: bool = False
    """Whether lost leases are left to their workers for now (`followups.store.last_tick`)."""


LOW_WATER_MARGIN = timedelta(seconds=10)
"""For rows created for now, or deferred by a moment, whose transaction commits a little later."""

FEW = 6
"""Rows that a fair claim reads in each workspace, however many workspaces there are."""
STRIDE = 32
"""Rows read in one step of the walk over the workspaces. A workspace's rows beyond these are skipped, and workspaces
with fewer rows share a step. So a workspace with a single row that is not due yet costs 0.5 us (2.4 us with a stride of
1), and one without pending rows costs nothing.
"""

_PENDING = "f.status = 'pending' AND f.waits_for IS NULL AND f.id <> ALL(CAST(:without AS uuid[]))"
_FREE = "f.lease_until IS NULL OR f.lease_until <= now() AND (f.begun_at IS NULL OR NOT CAST(:in_grace AS boolean))"
_HORIZON = "now() + CAST(:ahead AS interval)"
_SINCE = "COALESCE(CAST(:since AS timestamptz), '-infinity')"

# ``head`` has the candidate rows in the order in which they are to be taken, by their place in the table. ``looked`` is
# one row: how many of the candidates are leased, when the first falls due, and whether there are more. A row that is
# updated meanwhile has moved, and is skipped like a locked one.
_TAKE = f"""
    taken AS MATERIALIZED (
        SELECT f.place, f.begun_at IS NOT NULL AS lost
          FROM head
         CROSS JOIN LATERAL (
             SELECT f.ctid AS place, f.begun_at FROM follow_ups f
              WHERE f.ctid = head.place AND {_PENDING}
                AND {DUE} <= {_HORIZON} AND ({_FREE})
                FOR NO KEY UPDATE SKIP LOCKED
         ) f
         WHERE head.free
         LIMIT LEAST(:most, GREATEST(0, :window - (SELECT leased FROM looked)))
    ), claimed AS (
        UPDATE follow_ups f
           SET lease_token = {NEXT_TOKEN},
               lease_until = GREATEST(now(), {DUE}) + CAST(:lease AS interval),
               begun_at = NULL,
               attempts = GREATEST(f.attempts - taken.lost::int, 0),
               losses = f.losses + taken.lost::int
          FROM taken
         WHERE f.ctid = taken.place
        RETURNING f.id, f.lease_token, {DUE_READ} AS due, f.losses, f.workspace_id, f.traceparent, taken.lost,
                  f.attempts, f.cancel_requested
    )
    -- the first row says what was looked at
    SELECT NULL AS id, NULL AS lease_token, NULL AS due, NULL AS losses, NULL AS workspace_id, NULL AS traceparent,
           NULL AS lost, NULL AS attempts, NULL AS cancel_requested,
           looked.leased, looked.unseen,
           GREATEST(LEAST(looked.first, now()), timestamptz '0002-01-01') - CAST(:margin AS interval) AS low_water,
           (SELECT count(*) FROM taken) AS taken
      FROM looked
     UNION ALL
    SELECT claimed.*, NULL, NULL, NULL, NULL FROM claimed
     ORDER BY due NULLS FIRST, id
"""  # noqa: S608 - no input, only the constants above

# Rows in flight are first in the index, apart from rows that came in with an earlier due date. Reading :seen_most rows
# at most bounds the cost of a tick. If there are more, leased ones left by a fair claim may be behind them, so nothing
# is taken then.
_IN_ORDER = text(f"""
    WITH head AS MATERIALIZED (
        SELECT f.ctid AS place, {DUE} AS due, {_FREE} AS free
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

WITHOUT_SORTING = text(
    "SELECT set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true)"
)
"""For a fair claim. If the planner takes the table for almost empty, it reads and sorts everything pending for each
workspace instead of following the index that has this order. Measured right after an insert of 30,000 rows: 311 ms, and
with a thousand other workspaces more than 10 s.
"""

_KEY = f"(f.workspace_id, {DUE}, f.id)"
"""A row comparison in the order of one index."""
_DUE_ORDER = f"ORDER BY f.workspace_id, {DUE}, f.id"
_HIGHEST_ID = "'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid"


def _read_on(look: str, opening: str, rows: str) -> str:
    """Return a query that continues each workspace's look where it ended, until ``rows`` more are free.

    A look has a row for each workspace: how many rows read are ``leased``, the places of the free ones (``places``),
    their due times (``dues``), the last row read, and whether there may be ``more``. Leased rows are only counted.
    Where ``rows`` is zero, the workspace's row stays as it was.
    """
    return f"""
        SELECT seen.id, seen.first, seen.leased + passed.leased AS leased, seen.places || found.places AS places,
               seen.dues || found.dues AS dues, COALESCE(found.due, seen.due) AS due,
               COALESCE(found.last_id, seen.last_id) AS last_id, seen.more AND found.number = wanted.rows AS more
          FROM {look} seen CROSS JOIN {opening}
         CROSS JOIN LATERAL (SELECT {rows} AS rows) wanted
         CROSS JOIN LATERAL (
             SELECT count(*) AS number, array_agg(f.place) AS places, array_agg(f.due) AS dues,
                    max(f.due) AS due, (array_agg(f.id))[count(*)] AS last_id
               FROM (
                   SELECT f.ctid AS place, f.id, {DUE} AS due FROM follow_ups f
                    WHERE {_PENDING} AND ({_FREE}) AND {_KEY} > (seen.id, seen.due, seen.last_id)
                      AND (f.workspace_id, {DUE}) <= (seen.id, {_HORIZON})
                    {_DUE_ORDER}
                    LIMIT wanted.rows
               ) f
         ) found
         CROSS JOIN LATERAL (
             SELECT count(*) AS leased
               FROM (
                   SELECT FROM follow_ups f
                    WHERE {_PENDING} AND NOT ({_FREE}) AND {_KEY} > (seen.id, seen.due, seen.last_id)
                      AND {_KEY} <= (seen.id, CASE WHEN found.number = wanted.rows THEN found.due ELSE {_HORIZON} END,
                                     CASE WHEN found.number = wanted.rows THEN found.last_id ELSE {_HIGHEST_ID} END)
                    {_DUE_ORDER}
                    LIMIT :window
               ) f
         ) passed
         WHERE wanted.rows > 0
         UNION ALL
        SELECT seen.* FROM {look} seen CROSS JOIN {opening} WHERE ({rows}) = 0
    """  # noqa: S608 - no input, only constants


def _open_in(look: str) -> str:
    """Return a query for what a look leaves: free ``places``, how many of them it has not found, ``many`` have more."""
    return f"""
        SELECT places, (places - found)::bigint AS missing, many
          FROM (SELECT LEAST(:most, :window - sum(leased)) AS places, sum(cardinality(places)) AS found,
                       count(*) FILTER (WHERE more) AS many
                  FROM {look}) counted
    """  # noqa: S608 - no input, only constants


_SHARE = """CASE
    WHEN NOT seen.more OR share.places <= 0 THEN 0
    WHEN share.missing > 0 THEN LEAST(:most, GREATEST(:few, :window / share.many + 1))
    WHEN 2 * cardinality(seen.places) < :few THEN :few
    ELSE 0
END"""
_REST = "CASE WHEN seen.more AND rest.missing > 0 THEN ceil(rest.missing::numeric / rest.many)::bigint ELSE 0 END"

# The workspaces in which a follow-up is due. The index of pending follow-ups is ordered by workspace, so each step
# starts after the last workspace of the step before.
_WALK = f"""
    WITH RECURSIVE walk AS (
        SELECT '00000000-0000-0000-0000-000000000000'::uuid AS last, '{{}}'::uuid[] AS due_in
         UNION ALL
        SELECT step.*
          FROM walk
         CROSS JOIN LATERAL (
             SELECT (array_agg(f.workspace_id))[count(*)] AS last,
                    array_agg(f.workspace_id) FILTER (WHERE f.due <= {_HORIZON}) AS due_in
               FROM (
                   SELECT f.workspace_id, {DUE} AS due FROM follow_ups f
                    WHERE {_PENDING} AND f.workspace_id > walk.last AND {DUE} >= {_SINCE}
                    {_DUE_ORDER}
                    LIMIT :stride
               ) f
         ) step
         WHERE step.last IS NOT NULL
    )"""  # noqa: S608 - no input, only the constants above

# There are three looks. The first reads a few rows of each workspace, which is all that most workspaces have. Where
# there are more and they are wanted, the second reads an equal share of the window. The third gives the places that
# others left to those that have yet more. So many workspaces cost a few rows each, and one with a backlog beside a
# thousand small ones still fills the window. A row's rank is how many of its workspace would be in flight with it; the
# lowest ranks are taken first, and among these the earliest due. Leased rows behind more free rows than are read are
# not counted: the free ones came in with an earlier due date, or their leases ran out. They are taken first, so such a
# claim exceeds the window once, by its own size at most, and the next one counts all.
_FAIRLY = text(f"""{_WALK}, workspace AS MATERIALIZED (
        SELECT w.id, f.*
          FROM (SELECT DISTINCT unnest(due_in) AS id FROM walk) w
         CROSS JOIN LATERAL (
             SELECT min(f.due) AS first, count(*) FILTER (WHERE NOT f.free) AS leased,
                    COALESCE(array_agg(f.place) FILTER (WHERE f.free), '{{}}') AS places,
                    COALESCE(array_agg(f.due) FILTER (WHERE f.free), '{{}}') AS dues,
                    max(f.due) AS due, (array_agg(f.id))[count(*)] AS last_id, count(*) = :few AS more
               FROM (
                   SELECT f.ctid AS place, f.id, {DUE} AS due, {_FREE} AS free FROM follow_ups f
                    WHERE {_PENDING} AND (f.workspace_id, {DUE}) >= (w.id, {_SINCE})
                      AND (f.workspace_id, {DUE}) <= (w.id, {_HORIZON})
                    {_DUE_ORDER}
                    LIMIT :few
               ) f
         ) f
         WHERE f.first IS NOT NULL
    ), share AS MATERIALIZED ({_open_in("workspace")}
    ), first_look AS MATERIALIZED ({_read_on("workspace", "share", _SHARE)}
    ), rest AS MATERIALIZED ({_open_in("first_look")}
    ), second_look AS MATERIALIZED ({_read_on("first_look", "rest", _REST)}
    ), head AS MATERIALIZED (
        SELECT one.place, true AS free
          FROM second_look CROSS JOIN LATERAL unnest(places, dues) WITH ORDINALITY AS one(place, due, number)
         ORDER BY leased + number, one.due, one.place
    ), looked AS MATERIALIZED (
        SELECT COALESCE(sum(leased), 0) AS leased, min(first) AS first, COALESCE(bool_or(more), false) AS unseen
          FROM second_look
    ), {_TAKE}
""")  # noqa: S608 - no input, only the constants above


# The same query without the lease: the ids of the follow-ups that such a claim would take.
_NAMED = f"""
    {_TAKE.partition(", claimed AS")[0]}
    SELECT f.id FROM taken JOIN follow_ups f ON f.ctid = taken.place
"""  # noqa: S608 - no input, only the constants above
_CANDIDATES, _CANDIDATES_FAIRLY = (text(query.text.replace(_TAKE, _NAMED)) for query in (_IN_ORDER, _FAIRLY))
_TRY = text(f"""
    WITH taken AS MATERIALIZED (
        SELECT f.id, f.begun_at IS NOT NULL AS lost FROM follow_ups f
         WHERE f.id = ANY(CAST(:ids AS uuid[]))
           FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE follow_ups f
       SET lease_token = {NEXT_TOKEN}, lease_until = now() + interval '1 minute', begun_at = NULL,
           attempts = GREATEST(f.attempts - taken.lost::int, 0), losses = f.losses + taken.lost::int
      FROM taken
     WHERE f.id = taken.id
    RETURNING f.id, f.lease_token, {DUE_READ} AS due, f.losses, f.attempts, f.cancel_requested, taken.lost
""")  # noqa: S608 - no input, only the constants above


def candidates(connection: Connection, look: Look, *, fairly: bool) -> list[UUID]:
    """Return the ids that a claim would lease, in its order, and lock their rows for this transaction.

    ``fairly`` is for a claim by `claim_fairly`.
    """
    connection.execute(WITHOUT_SORTING)
    parameters = _parameters(look)
    in_order = parameters | {"seen_most": look.window + look.most}
    if not fairly and (ids := connection.scalars(_CANDIDATES, in_order).all()):
        return list(ids)
    return list(connection.scalars(_CANDIDATES_FAIRLY, parameters | {"few": FEW, "stride": STRIDE}))


def try_to_lease(connection: Connection, ids: Sequence[UUID]) -> list[Lost]:
    """Write to the rows as a claim does, for a caller that rolls back; return those with a lost lease.

    Raises whatever error the content of a row causes.
    """
    rows = connection.execute(_TRY, {"ids": uuid_array(ids)})
    return [
        Lost(Lease(row.id, row.lease_token, row.due, row.losses), row.attempts, row.cancel_requested)
        for row in rows
        if row.lost
    ]


def claim(connection: Connection, look: Look) -> Claim:
    """Lease what is due, the earliest first; expired leases are taken over.

    If there is ``more``, `claim_fairly` should come next.
    """
    rows = connection.execute(_IN_ORDER, _parameters(look) | {"seen_most": look.window + look.most}).all()
    return claim_fairly(connection, look) if rows[0].unseen else _claim_of(connection, rows, look)


def claim_fairly(connection: Connection, look: Look) -> Claim:
    """Lease what is due, first of the workspaces with the fewest in flight, the earliest due first in each."""
    connection.execute(WITHOUT_SORTING)
    return _claim_of(
        connection, connection.execute(_FAIRLY, _parameters(look) | {"few": FEW, "stride": STRIDE}).all(), look
    )


def _parameters(look: Look) -> dict[str, object]:
    return asdict(look) | {"margin": LOW_WATER_MARGIN, "without": list(look.without)}


def _claim_of(connection: Connection, rows: Sequence[Any], look: Look) -> Claim:
    looked, *claimed = rows
    if claimed:
        marks.leased(connection, ((row.id, row.lease_token) for row in claimed))
    leases, lost, traced = [], [], []
    for id_, token, due, losses, workspace_id, traceparent, was_lost, attempts, cancel_requested, *_ in claimed:
        lease = Lease(id_, token, due, losses, key_of(workspace_id))
        leases.append(lease)
        if was_lost:
            lost.append(Lost(lease, attempts, cancel_requested))
        if traceparent:
            traced.append((id_, traceparent))
    room = max(0, look.window - looked.leased)
    return Claim(
        tuple(leases),
        tuple(lost),
        tuple(traced),
        # A row that was updated at that moment has another place, and gets no lease.
        more=looked.taken >= min(look.most, room) or looked.unseen,
        cut_short=looked.taken == look.most < room,
        low_water=looked.low_water,
    )
