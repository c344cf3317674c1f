"""Claims: the statements that lease due follow-ups, in the order of due dates or shared fairly between workspaces.

While all due follow-ups fit into the window (the in-flight limit), the order of due dates is fair in itself, and the
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
from followups.store.fragments import DUE_READ, NEXT_TOKEN, read_sql
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
    """The follow-ups with a lost lease, which ran out with an attempt in flight."""
    traced: tuple[tuple[UUID, str], ...]
    """The follow-ups created in a trace: ids with their ``traceparent``."""
    more: bool
    """Whether more may be due: this claim, or the window, was full."""
    cut_short: bool
    """Whether another claim now would find more: this one was full, and the window was not."""
    low_water: datetime | None
    """Where the next claim may start, apart from rows that come in with an earlier due date."""
    ended: tuple[tuple[UUID, Final], ...] = ()
    """Follow-ups with a lost lease that must not be tried again; they are not among the leases."""
    in_grace: bool = False
    """Whether ended leases with an attempt in flight were left to their workers.

    Another claim takes these leases over shortly.
    """
    busy: bool = False
    """Whether another dispatcher was claiming, so that this claim read nothing."""


@dataclass(frozen=True, slots=True)
class ClaimSearch:
    """The search of a claim: rows that fall due within ``ahead``, but not before ``since``.

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
"""For rows created for now, or deferred briefly, whose transaction commits a little later."""

FEW = 6
"""Rows that a fair claim reads in each workspace, however many workspaces there are."""
STRIDE = 32
"""Rows read in one step of the walk over the workspaces. A workspace's rows beyond these are skipped, and workspaces
with fewer rows share a step. So a workspace with a single row that is not due yet costs 0.5 us (2.4 us with a stride of
1), and one without pending rows costs nothing.
"""

_IN_ORDER, _FAIRLY = (text(read_sql(name) + read_sql("lease")) for name in ("claim", "fair_claim"))

WITHOUT_SORTING = text(
    "SELECT set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true)"
)
"""For a fair claim. If the planner takes the table for almost empty, it reads and sorts everything pending for each
workspace instead of following the index that has this order. Measured right after an insert of 30,000 rows: 311 ms, and
with a thousand other workspaces more than 10 s.
"""

_NAME = " SELECT f.id FROM taken JOIN follow_ups f ON f.ctid = taken.place"
# The same queries without the lease: the ids of the follow-ups that such a claim would take.
_CANDIDATES, _CANDIDATES_FAIRLY = (
    text(query.text.partition(", claimed AS")[0] + _NAME) for query in (_IN_ORDER, _FAIRLY)
)
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


def candidates(connection: Connection, look: ClaimSearch, *, fairly: bool) -> list[UUID]:
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


def claim(connection: Connection, look: ClaimSearch) -> Claim:
    """Lease due follow-ups, the earliest first; expired leases are taken over.

    If there is ``more``, `claim_fairly` should come next.
    """
    rows = connection.execute(_IN_ORDER, _parameters(look) | {"seen_most": look.window + look.most}).all()
    return claim_fairly(connection, look) if rows[0].unseen else _claim_of(connection, rows, look)


def claim_fairly(connection: Connection, look: ClaimSearch) -> Claim:
    """Lease due follow-ups, first of the workspaces with the fewest in flight, the earliest due first in each."""
    connection.execute(WITHOUT_SORTING)
    return _claim_of(
        connection, connection.execute(_FAIRLY, _parameters(look) | {"few": FEW, "stride": STRIDE}).all(), look
    )


def _parameters(look: ClaimSearch) -> dict[str, object]:
    return asdict(look) | {"margin": LOW_WATER_MARGIN, "without": list(look.without)}


def _claim_of(connection: Connection, rows: Sequence[Any], look: ClaimSearch) -> Claim:
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
        # A row that was updated at the same time has another place, and gets no lease.
        more=looked.taken >= min(look.most, room) or looked.unseen,
        cut_short=looked.taken == look.most < room,
        low_water=looked.low_water,
    )
