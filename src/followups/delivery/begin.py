"""Begin: right before sending, check again that the follow-up may be sent, and record that an attempt is in flight."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from followups.delivery import events, holds
from followups.halving import halve, halve_within
from followups.states import ReasonCode, Status, finish
from followups.store import chat_order, leases
from followups.store.leases import World
from followups.transactions import transact

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings
    from followups.states import Final
    from followups.store.leases import Begun, Lease, Obstacle

LEAD = timedelta(milliseconds=15)
"""How long before the due moment begin is called, so that the send itself is on time. From then on a cancel comes too
late.
"""

TOLERANCE = timedelta(milliseconds=100)
"""How early the database accepts a begin: the lead, and the possible error of a worker's clock."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The result for a batch of leases. Those in no field were stale, are held, or wait in their chat's order."""

    begun: tuple[Begun, ...] = ()
    ended: tuple[tuple[UUID, Final], ...] = ()
    """Ended without an attempt."""
    again: tuple[Lease, ...] = ()
    """Still leased, to be tried again shortly: another transaction has locked the row."""
    woken: tuple[Lease, ...] = ()
    """Unblocked by the ended ones, each the next of its chat; leased to the caller."""
    locked: tuple[UUID, ...] = ()
    """Ended follow-ups whose next one in the chat is locked by another transaction."""
    later: tuple[tuple[Lease, timedelta], ...] = ()
    """Still leased; each with the time until its turn under a rate limit."""


REFUSED_PAUSE = timedelta(minutes=1)
"""How long a follow-up is deferred if its row cannot be read or written.

Only an operator can repair such a row.
"""


def begin(engine: Engine, settings: Settings, batch: Sequence[Lease]) -> Beginning:
    """Begin the follow-ups that may be sent, end those that must not be, and hold or park the rest.

    All of this is one transaction. A follow-up whose row makes it fail is deferred, and the others begin without it.
    """
    halved = halve(batch, lambda part: transact(engine, partial(_begin, settings, part)))
    for lease, error in halved.refused:
        events.refused("begin", lease.id, error)
        _defer(engine, lease)
    if len(halved.done) == 1 and not halved.left:
        return halved.done[0]
    parts = {
        field.name: tuple(chain.from_iterable(getattr(part, field.name) for part in halved.done))
        for field in fields(Beginning)
    }
    return Beginning(**parts | {"again": (*parts["again"], *halved.left)})


def _defer(engine: Engine, lease: Lease) -> None:
    try:
        transact(engine, lambda connection: leases.defer_if_not_begun(connection, [lease], REFUSED_PAUSE))
    except Exception as error:  # noqa: BLE001 - its lease ends then; what has begun must be sent whatever happens here
        events.refused("defer", lease.id, error)


def _begin(settings: Settings, batch: Sequence[Lease], connection: Connection) -> Beginning:
    world = World(settings.lease, settings.max_lateness, TOLERANCE)
    begun = leases.begin_if_leased(connection, batch, world)
    if len(begun) == len(batch):
        return Beginning(tuple(begun))
    started = {one.lease.id for one in begun}
    missing = [lease for lease in batch if lease.id not in started]
    return _explain_missing(connection, settings, begun, leases.obstacles(connection, missing, world))


def _explain_missing(
    connection: Connection, settings: Settings, begun: list[Begun], obstacles: list[Obstacle]
) -> Beginning:
    holding = holds.hold_back(connection, settings, obstacles)
    obstacles = [obstacle for obstacle in obstacles if obstacle.lease.id not in holding.held]
    verdicts = [(o.lease, final) for o in obstacles if (final := holding.ends.get(o.lease.id) or verdict(o))]
    ended = leases.end_if_not_begun(connection, verdicts) if verdicts else set()
    judged = {lease.id for lease, _ in verdicts}
    waiting = [(o.lease, o.earlier) for o in obstacles if o.earlier and o.lease.id not in judged]
    parked = chat_order.park_if_leased(connection, waiting) if waiting else set()
    if parked:
        # If a row behind them cannot be written, those that can be are parked one by one.
        halve_within(connection, list(parked), partial(chat_order.park_pile, connection))
    unblocked = chat_order.unblock_writable(connection, ended, settings.lease)
    return Beginning(
        begun=tuple(begun),
        ended=tuple((lease.id, final) for lease, final in verdicts if lease.id in ended),
        again=tuple(o.lease for o in obstacles if o.lease.id not in ended | parked),
        woken=unblocked.leases,
        locked=unblocked.locked,
    )


def verdict(obstacle: Obstacle) -> Final | None:
    """Return how a follow-up ends that must not be sent any more, or None if it may be sent later."""
    if obstacle.chat_removed:
        return finish(Status.CANCELLED, ReasonCode.CHAT_REMOVED)
    if obstacle.silence_broken:
        return finish(Status.CANCELLED, ReasonCode.USER_REPLIED)
    if obstacle.taken_over:
        return finish(Status.CANCELLED, ReasonCode.HUMAN_TAKEOVER)
    if obstacle.too_late:
        return finish(Status.FAILED, ReasonCode.TOO_LATE)
    if obstacle.window_closed:
        return finish(Status.FAILED, ReasonCode.WINDOW_CLOSED)
    return None
