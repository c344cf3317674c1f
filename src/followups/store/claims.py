"""Claims: the statements that lease due follow-ups, by due date or shared fairly between workspaces.

In this module, ``window`` means the in-flight limit. Claiming by due date is fair and cheapest while all due follow-ups
fit into the in-flight limit. During a backlog, claiming by due date is unfair. A workspace with 100,000 overdue
follow-ups would be served first. During a backlog, free slots go to the workspaces with the fewest follow-ups in
flight.

Each claim is one guarded statement, which skips rows that another transaction has locked.

This module updates the planner's statistics itself, because claims depend on them. Autovacuum updates the statistics
only minutes later. If a table has been emptied, vacuumed and quickly refilled, the planner expects one row until
autovacuum runs. To a planner that expects one row, any index that contains the id seems as good as the primary key. In
an index whose first column is not the id, each look-up of an id scans the whole index. With wrong statistics and 50,000
due follow-ups, each step of a batch took seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from followups.event_loop import driver_rows
from followups.statements import Statement
from followups.store import commit_checks
from followups.store.fragments import DUE_READ, NEXT_TOKEN, read_sql
from followups.store.leases import Lease, key_of, uuid_array

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from followups.states import Final


class Lost(NamedTuple):
    """A follow-up claimed again after its lease expired during attempt ``attempts + 1``."""

    lease: Lease
    attempts: int
    cancel_requested: str | None


@dataclass(frozen=True, slots=True)
class Claim:
    """The result of a claim: its leases, earliest due first, and what the claim found."""

    leases: tuple[Lease, ...]
    lost: tuple[Lost, ...]
    """Follow-ups whose lease expired while an attempt was in flight."""
    traced: tuple[tuple[UUID, str], ...]
    """The ids of claimed follow-ups that were created in a trace, each with its ``traceparent``."""
    more: bool
    """True if the claim was full or reached the in-flight limit: more follow-ups may then be due."""
    cut_short: bool
    """Whether the claim reached its maximum size and left room in the in-flight window for another claim."""
    low_water: datetime | None
    """The due time from which the next claim may start, unless earlier rows are added."""
    ended: tuple[tuple[UUID, Final], ...] = ()
    """Follow-ups that lost their leases and must not be retried; they are not in ``leases``."""
    in_grace: bool = False
    """Whether the claim skipped expired leases whose attempts are still in flight.

    The first claim after the grace period takes over these leases.
    """
    busy: bool = False
    """Whether the claim read nothing because another dispatcher was claiming at the same time."""


class ClaimSearch(NamedTuple):
    """A claim's search range: rows that fall due within ``ahead``, but not before ``since``.

    A claim takes up to ``most`` follow-ups and leases them for ``lease``. At most ``window`` follow-ups are in flight.
    """

    ahead: timedelta
    lease: timedelta
    window: int
    most: int
    since: datetime | None = None
    without: tuple[UUID, ...] = ()
    """Follow-ups whose rows cannot be written; the claim skips them."""
    in_grace: bool = False
    """Whether workers are in the grace period for recording outcomes (`followups.store.last_tick`)."""


class Totals(NamedTuple):
    """The totals of a claim, from the first row that lease.sql returns."""

    leased: int
    """Number of follow-ups in flight."""
    unseen: bool
    """Whether a fair claim is needed because some due rows have not been read."""
    low_water: datetime | None
    taken: int
    """Number of rows that the claim could lease."""


LOW_WATER_MARGIN = timedelta(seconds=10)
"""Margin before the low-water mark, for due rows that are committed slightly late."""

FEW = 6
"""Number of rows that a fair claim reads for each workspace."""
STRIDE = 32
"""Number of rows read in one step of the scan over all workspaces. The next step starts after the last workspace that
was read. One step can read several workspaces if they have few rows. The scan needs 0.5 us for a workspace with a
single row that is not yet due. With a stride of 1, it needs 2.4 us. A workspace without pending rows costs nothing.
"""

_IN_ORDER, _FAIRLY = (read_sql(name) + read_sql("lease") for name in ("claim", "fair_claim"))
_CLAIM, _CLAIM_FAIRLY = Statement(_IN_ORDER), Statement(_FAIRLY)

WITHOUT_SORTING = text(
    "SELECT set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true)"
)
"""SQL that keeps the planner from sorting rows in a fair claim. A planner that considers the table almost empty would
sort each workspace's pending rows. The sort is unnecessary, because an index already has this order. After 30,000
inserts, a claim with sorting took 311 ms; with a thousand other workspaces, over 10 s.
"""

_NAME = " SELECT f.id FROM taken JOIN follow_ups f ON f.ctid = taken.place"
# Each query returns only the ids of follow-ups that a claim would lease.
_CANDIDATES, _CANDIDATES_FAIRLY = (text(sql.partition(", claimed AS")[0] + _NAME) for sql in (_IN_ORDER, _FAIRLY))
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
    """Lock the rows that a claim would lease, and return their ids in the order of the claim.

    With ``fairly``, the ids are those that `claim_fairly` would lease.
    """
    connection.execute(WITHOUT_SORTING)
    parameters = _parameters(look)
    in_order = parameters | {"seen_most": look.window + look.most}
    if not fairly and (ids := connection.scalars(_CANDIDATES, in_order).all()):
        return list(ids)
    return list(connection.scalars(_CANDIDATES_FAIRLY, parameters | {"few": FEW, "stride": STRIDE}))


def try_to_lease(connection: Connection, ids: Sequence[UUID]) -> list[Lost]:
    """Try to lease the rows in a transaction that will be rolled back; return the lost leases.

    Raises any error that the content of a row causes.
    """
    rows = connection.execute(_TRY, {"ids": uuid_array(ids)})
    return [
        Lost(Lease(row.id, row.lease_token, row.due, row.losses), row.attempts, row.cancel_requested)
        for row in rows
        if row.lost
    ]


def claim(connection: Connection, look: ClaimSearch) -> Claim:
    """Lease due follow-ups, the earliest first, and take over expired leases.

    If ``more`` is true in the result, the caller should use `claim_fairly` next.
    """
    parameters = _parameters(look) | {"seen_most": look.window + look.most}
    totals, *claimed = driver_rows(connection, _CLAIM, parameters)
    found = Totals(*totals[-4:])
    return claim_fairly(connection, look) if found.unseen else _claim_of(connection, found, claimed, look)


def claim_fairly(connection: Connection, look: ClaimSearch) -> Claim:
    """Lease due follow-ups, starting with the workspaces that have the fewest in flight.

    Within each workspace, the follow-ups with the earliest due dates are leased first.
    """
    connection.execute(WITHOUT_SORTING)
    parameters = _parameters(look) | {"few": FEW, "stride": STRIDE}
    totals, *claimed = driver_rows(connection, _CLAIM_FAIRLY, parameters)
    return _claim_of(connection, Totals(*totals[-4:]), claimed, look)


def _parameters(look: ClaimSearch) -> dict[str, object]:
    return look._asdict() | {"margin": LOW_WATER_MARGIN, "without": list(look.without)}


def _claim_of(connection: Connection, found: Totals, claimed: Sequence[tuple[Any, ...]], look: ClaimSearch) -> Claim:
    if claimed:
        commit_checks.by_token(connection, ((id_, token) for id_, token, *_ in claimed))
    leases, lost, traced = [], [], []
    for id_, token, due, losses, workspace_id, traceparent, was_lost, attempts, cancel_requested, *_ in claimed:
        lease = Lease(id_, token, due, losses, key_of(workspace_id))
        leases.append(lease)
        if was_lost:
            lost.append(Lost(lease, attempts, cancel_requested))
        if traceparent:
            traced.append((id_, traceparent))
    room = max(0, look.window - found.leased)
    return Claim(
        tuple(leases),
        tuple(lost),
        tuple(traced),
        # If another transaction updates a row during the claim, the row gets a new ctid and is not leased.
        more=found.taken >= min(look.most, room) or found.unseen,
        cut_short=found.taken == look.most < room,
        low_water=found.low_water,
    )


# ANALYZE skips a table locked by VACUUM or a similar command, which itself updates the statistics.
_ANALYZE = text("ANALYZE (SKIP_LOCKED) follow_ups")
_COUNTED = text("SELECT reltuples FROM pg_class WHERE oid = 'follow_ups'::regclass")


def planner_expects_fewer_than(engine: Engine, number: int) -> bool:
    """Return whether the planner expects the table to have fewer than the given number of rows.

    The estimate is good even for a new table, because it is based on the table's size.
    """
    with engine.connect() as connection:
        return bool(0 <= connection.execute(_COUNTED).scalar_one() < number)


def refresh_planner_statistics(engine: Engine) -> None:
    """Run ANALYZE on the table of follow-ups, which reads some 30,000 rows and blocks nothing.

    Raises database errors.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(_ANALYZE)
