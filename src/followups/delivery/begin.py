"""Begin: check again, right before sending, whether the follow-up may be sent.

If the follow-up may be sent, the database records that an attempt is in flight.
"""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from followups.delivery import events, hold
from followups.delivery.attempts import BatchResult, Begun
from followups.halving import halve, halve_within
from followups.states import ReasonCode, Status, finish
from followups.store import chat_order, external_ids, leases, obstacles
from followups.store.external_ids import OwnedId
from followups.store.leases import Rules
from followups.transactions import in_loop, transact
from followups.transports.port import Delivery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from sqlalchemy import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from followups.flow_control.limiter import RateLimits
    from followups.settings import Settings
    from followups.states import Final
    from followups.store.leases import Lease
    from followups.store.obstacles import Obstacle

    Work = Callable[[Sequence[Lease], Connection], BatchResult]

TOLERANCE = timedelta(milliseconds=100)
"""How early an attempt may begin: the lead plus the largest error of a worker's clock."""


REFUSED_PAUSE = timedelta(minutes=1)
"""How long a follow-up is deferred if its row cannot be read or written.

Only an operator can repair a row that cannot be read or written.
"""


async def begin_within_limits(
    engine: AsyncEngine, settings: Settings, rate_limits: RateLimits, batch: Sequence[Lease]
) -> BatchResult:
    """Begin the follow-ups that may be sent now, and defer follow-ups that exceed a rate limit.

    No rate-limit token is used up if the database raises an error.
    """
    if not rate_limits:
        return await in_loop(engine, begin, settings, batch)
    async with rate_limits.tokens(batch) as (waits, begun):
        deferred = await rate_limits.defer([(lease, waits[lease.id]) for lease in batch if lease.id in waits])
        allowed = [lease for lease in batch if lease.id not in waits]
        step = await in_loop(engine, begin, settings, allowed) if allowed else BatchResult()
        begun |= {one.lease.id for one in step.begun}
    return replace(step, deferred=deferred)


def begin(engine: Engine, settings: Settings, batch: Sequence[Lease]) -> BatchResult:
    """Begin the follow-ups that may be sent, end those that must not, and hold or park the rest.

    The whole batch uses one transaction. If a row cannot be written, only its follow-up is deferred; all other
    follow-ups begin.
    """
    return _in_parts(engine, batch, partial(_begin, settings))


def end_hold_or_park(engine: Engine, settings: Settings, batch: Sequence[Lease]) -> BatchResult:
    """End the follow-ups that must not be sent, like `begin`, but begin none of the others."""
    return _in_parts(engine, batch, partial(_end_hold_or_park, settings))


def _in_parts(engine: Engine, batch: Sequence[Lease], work: Work) -> BatchResult:
    halved = halve(batch, lambda part: transact(engine, partial(work, part)))
    for lease, error in halved.refused:
        events.refused("begin", lease.id, error)
        _defer(engine, lease)
    if len(halved.done) == 1 and not halved.left:
        return halved.done[0]
    parts: dict[str, Any] = {
        field.name: tuple(chain.from_iterable(getattr(part, field.name) for part in halved.done))
        for field in fields(BatchResult)
        if field.name != "stale"
    }
    return BatchResult(**parts | {"retry_later": (*parts["retry_later"], *halved.left)})


def _defer(engine: Engine, lease: Lease) -> None:
    try:
        transact(engine, lambda connection: leases.defer_if_not_begun(connection, [lease], REFUSED_PAUSE))
    except Exception as error:  # noqa: BLE001 - its lease ends then; what has begun must be sent whatever happens here
        events.refused("defer", lease.id, error)


def _begin(settings: Settings, batch: Sequence[Lease], connection: Connection) -> BatchResult:
    rules = Rules(settings.lease, settings.max_lateness, TOLERANCE)
    begun = tuple(
        Begun(_as_stored(batch[number - 1], token, due), Delivery(*rest), snoozes, traceparent)
        for number, _, token, due, snoozes, traceparent, *rest in leases.begin_if_leased(connection, batch, rules)
    )
    if settings.exclusive_external_ids:
        begun = _with_shared_marked(connection, begun)
    if len(begun) == len(batch):
        return BatchResult(begun)
    started = {one.lease.id for one in begun}
    missing = [lease for lease in batch if lease.id not in started]
    return _hold_end_or_park(connection, settings, begun, obstacles.find(connection, missing, rules))


def _end_hold_or_park(settings: Settings, batch: Sequence[Lease], connection: Connection) -> BatchResult:
    found = obstacles.find(connection, batch, Rules(settings.lease, settings.max_lateness, TOLERANCE))
    return _hold_end_or_park(connection, settings, (), found)


def _as_stored(lease: Lease, token: int, due: datetime) -> Lease:
    """Return the lease with its row's token and due time, which may differ from those in the hint."""
    return lease if lease.token == token and lease.due == due else lease._replace(token=token, due=due)


def _with_shared_marked(connection: Connection, begun: tuple[Begun, ...]) -> tuple[Begun, ...]:
    """Mark each delivery whose external id also belongs to a chat of another workspace.

    The transport rejects marked deliveries. The check uses the external ids that the begin statement has returned. If a
    chat's external id changes after that, the message still goes to the external id that was checked.
    """
    owned = {OwnedId(one.delivery.workspace_id, id_) for one in begun if (id_ := one.delivery.external_chat_id)}
    shared = external_ids.shared(connection, owned) if owned else ()
    if not shared:
        return begun
    return tuple(
        one._replace(delivery=replace(one.delivery, external_chat_id_is_shared=True))
        if (one.delivery.workspace_id, one.delivery.external_chat_id) in shared
        else one
        for one in begun
    )


def _hold_end_or_park(
    connection: Connection, settings: Settings, begun: tuple[Begun, ...], missing: list[Obstacle]
) -> BatchResult:
    held, not_held, ends = hold.hold(connection, settings, missing)
    missing = [obstacle for obstacle in missing if obstacle.lease.id not in held]
    # `begin` does not end a follow-up that should be held, because waiting for sending hours is not lateness.
    judgeable = [obstacle for obstacle in missing if obstacle.lease.id not in not_held]
    verdicts = [(o.lease, final) for o in judgeable if (final := ends.get(o.lease.id) or verdict(o))]
    ended = leases.end_if_not_begun(connection, verdicts) if verdicts else set()
    judged = {lease.id for lease, _ in verdicts}
    waiting = [(o.lease, o.earlier) for o in missing if o.earlier and o.lease.id not in judged]
    parked = chat_order.park_if_leased(connection, waiting) if waiting else set()
    if parked:
        # If a row cannot be written, the batch is divided, so that the other follow-ups are still parked.
        halve_within(connection, list(parked), partial(chat_order.park_pile, connection))
    unblocked, blocking = chat_order.unblock_writable(connection, ended, settings.lease)
    return BatchResult(
        begun=begun,
        ended=tuple((lease.id, final) for lease, final in verdicts if lease.id in ended),
        retry_later=tuple(o.lease for o in missing if o.lease.id not in ended | parked),
        unblocked=tuple(unblocked),
        blocking=tuple(blocking),
    )


def verdict(obstacle: Obstacle) -> Final | None:
    """Return a follow-up's final state, or None if the follow-up may be sent later."""
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
