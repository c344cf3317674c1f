"""The statements that begin, end or release leased follow-ups. Claims are in `followups.store.claims`.

One guarded SQL statement begins, ends or releases a whole batch. If another transaction has changed a follow-up, the
statement does not return that follow-up. No statement here waits for a lock that another transaction holds. Rows that
are locked or were just updated are skipped, reported and tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from followups import binary_arrays
from followups.channels import WINDOW, WINDOWED_CHANNELS
from followups.event_loop import driver_rows
from followups.statements import Statement
from followups.store import commit_checks
from followups.store.fragments import LEASED, honest, read_sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.states import Final


def uuid_array(ids: Iterable[UUID]) -> str:
    """Return UUIDs as a PostgreSQL array literal; adapting each element would take ten times as long."""
    return f"{{{','.join([one.hex for one in ids])}}}"


class Lease(NamedTuple):
    """The right to begin one follow-up. ``token`` is the fencing token, and ``due`` is the time at which to send.

    Several `Lease` objects are created for each follow-up, for example by the claim and by the due queue. A lease is a
    tuple because a dataclass takes twice as long to create.
    """

    id: UUID
    token: int
    due: datetime
    losses: int = 0
    """Number of lost leases; if above zero, the follow-up may be a poison pill."""
    key: int = 0
    """The key of the workspace queue (`key_of`), or 0 if it is unknown."""
    task_id: str = ""
    """The id of the Celery task whose hint brought the lease to its worker."""
    expires: float = inf
    """The `uptime` at which the worker drops the lease, because another worker may then own the follow-up."""
    refusals: int = 0
    """How many times in a row the due follow-up was not allowed to begin."""


WINDOWED_NAMES = sorted(channel.value for channel in WINDOWED_CHANNELS)

KEYS = 2**20
"""The number of different queue keys for workspaces. Two workspaces may have the same queue key and share a queue,
which is rare and harmless.
"""


def key_of(workspace_id: UUID) -> int:
    """Return the key of a workspace's queue: the last, random bits of the workspace's id."""
    return workspace_id.int % KEYS


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that decide whether a follow-up may begin."""

    lease: timedelta
    max_lateness: timedelta
    early: timedelta
    """How early a follow-up may begin; its sender then waits until the due time."""

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters of the SQL statement."""
        return {
            "lease": self.lease,
            "max_lateness": self.max_lateness,
            "early": self.early,
            "window": WINDOW,
            "windowed": WINDOWED_NAMES,
        }


_BATCH = "unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS b(id, token)"
_BEGIN = Statement(read_sql("begin_checks") + read_sql("begin"))


def begin_if_leased(connection: Connection, leases: Sequence[Lease], rules: Rules) -> Sequence[tuple[Any, ...]]:
    """Begin the follow-ups that have a valid lease and no obstacle; return the attempts to send.

    The first column is the lease's position in the batch (1, 2, ...). `begin.sql` lists the other columns.
    """
    rows = driver_rows(connection, _BEGIN, batch_of(leases) | rules.parameters)
    if rows:
        commit_checks.by_time(connection, ((leases[number - 1].id, begun_at) for number, begun_at, *_ in rows))
    return rows


_END = text(f"""
    WITH leased AS MATERIALIZED (
        SELECT f.id, b.status, b.reason, b.by_code
          FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[]), CAST(:statuses AS text[]),
                      CAST(:reasons AS text[]), CAST(:by_code AS boolean[])) AS b(id, token, status, reason, by_code)
          {LEASED}
    )
    UPDATE follow_ups f
       SET status = leased.status, finished_at = now(), updated_at = now(), lease_until = NULL,
           reason = CASE WHEN leased.by_code THEN {honest("leased.reason", "f")} ELSE leased.reason END
      FROM leased
     WHERE f.id = leased.id
    RETURNING f.id, f.finished_at
""")  # noqa: S608 - no input, only the constants above


def end_if_not_begun(connection: Connection, ends: Sequence[tuple[Lease, Final]]) -> set[UUID]:
    """End leased follow-ups without an attempt; return the follow-ups that this call ended."""
    parameters = batch_of([lease for lease, _ in ends]) | {
        "statuses": [final.status.value for _, final in ends],
        "reasons": [final.reason for _, final in ends],
        "by_code": [final.code is not None for _, final in ends],
    }
    rows = connection.execute(_END, parameters).all()
    if rows:
        commit_checks.by_time(connection, rows)
    return {row.id for row in rows}


_RELEASE = text(f"""
    WITH leased AS MATERIALIZED (
        SELECT f.id FROM {_BATCH} {LEASED}
    )
    UPDATE follow_ups f SET lease_until = NULL FROM leased WHERE f.id = leased.id
""")  # noqa: S608 - no input, only the constants above


def release_if_not_begun(connection: Connection, leases: Sequence[Lease]) -> int:
    """Release leases so that the next tick can claim them; return how many leases were valid."""
    return connection.execute(_RELEASE, batch_of(leases)).rowcount


_DEFER = text(f"""
    WITH leased AS MATERIALIZED (
        SELECT f.id FROM {_BATCH} {LEASED}
    )
    UPDATE follow_ups f SET next_attempt_at = now() + CAST(:delay AS interval), lease_until = NULL
      FROM leased
     WHERE f.id = leased.id
""")  # noqa: S608 - no input, only the constants above


def defer_if_not_begun(connection: Connection, leases: Sequence[Lease], delay: timedelta) -> int:
    """Defer leased follow-ups without using up an attempt; return how many leases were still valid."""
    return connection.execute(_DEFER, batch_of(leases) | {"delay": delay}).rowcount


def batch_of(leases: Sequence[Lease]) -> dict[str, object]:
    """Return the statement's parameters for a batch of leases: ids and tokens."""
    return {
        "ids": binary_arrays.uuids([lease.id for lease in leases]),
        "tokens": binary_arrays.bigints([lease.token for lease in leases]),
    }
