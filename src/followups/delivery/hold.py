"""Holds: defer paused follow-ups and those outside sending hours, without using up an attempt."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from followups.sending_hours import opens_at, span_of
from followups.states import Final, ReasonCode, Status, finish
from followups.store import holds
from followups.store.holds import NEVER, Hold, back_at
from followups.store.settlement import ENDED_MARGIN
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.settings import Settings
    from followups.store.holds import WorkspaceHours
    from followups.store.obstacles import Obstacle

UNREADABLE = timedelta(minutes=1)
"""How long to wait before checking sending hours again if this machine does not know their time zone."""

log = get_logger(__name__)


def hold(
    connection: Connection, settings: Settings, obstacles: Sequence[Obstacle]
) -> tuple[set[UUID], set[UUID], dict[UUID, Final]]:
    """Hold the leases that are blocked only by a pause or by sending hours.

    Returns three results: the held leases, the leases to check again, and the final states of follow-ups whose hold
    would last too long. A lease must be checked again if the pause or sending hours that block it are locked or have
    changed.
    """
    candidates = [one for one in obstacles if one.pause_id or one.hours]
    _open_next(connection, candidates)
    decided = [(one.lease.id, hold_or_end(one, settings.max_lateness)) for one in candidates]
    wanted = [one for _, one in decided if isinstance(one, Hold)]
    held = holds.hold_if_leased(connection, wanted) if wanted else set()
    if held:
        paused = sum(one.pause_id is not None for one in wanted if one.lease.id in held)
        log.info("held", paused=paused, outside_hours=len(held) - paused)
    not_held = {one.lease.id for one in wanted} - held
    return held, not_held, {id_: one for id_, one in decided if isinstance(one, Final)}


def hold_or_end(obstacle: Obstacle, max_lateness: timedelta) -> Hold | Final | None:
    """Return the hold of a leased follow-up, or its final state if the hold would last too long.

    Returns None if the follow-up should be neither held nor ended. Sending hours are checked before a pause, because
    lateness is not counted outside sending hours. This function is pure.
    """
    if obstacle.chat_removed or obstacle.silence_broken or obstacle.taken_over or obstacle.window_closed:
        return None
    opening = closed_until(obstacle)
    since = sendable_from(obstacle)
    if obstacle.too_late and (since is None or obstacle.now >= since + max_lateness):
        return None
    until = opening or (since if obstacle.too_late else None)
    if until is None or obstacle.hours is None:
        # If a follow-up waits for an earlier follow-up, it is parked rather than held.
        paused = obstacle.pause_id and not obstacle.earlier
        return Hold(obstacle.lease, NEVER, NEVER, since, obstacle.pause_id) if paused else None
    if obstacle.window_ends is not None and until >= obstacle.window_ends:
        return finish(
            Status.FAILED,
            ReasonCode.WINDOW_CLOSED,
            "the messaging window ends before the workspace's sending hours open",
        )
    next_attempt_at = back_at(until, obstacle.due_date)
    ends = since + max_lateness if since and max_lateness else None
    if ends and until >= ends:
        # wake at the lateness limit, so that the follow-up does not wait for the sending hours before it fails
        until, next_attempt_at = ends, ends + ENDED_MARGIN
    return Hold(obstacle.lease, until, next_attempt_at, since, hours=obstacle.hours.hours)


def closed_until(obstacle: Obstacle) -> datetime | None:
    """Return when sending hours open next, or None if they are unset or open at the time of sending.

    A stored sending period takes precedence over this machine's time zone data until the period ends. This function is
    pure.
    """
    hours, moment = obstacle.hours, obstacle.send_time
    if hours is None:
        return None
    if obstacle.now < hours.open_until and moment < hours.open_until:
        return hours.open_from if moment < hours.open_from else None
    try:
        opening = opens_at(hours.hours, moment)
    except LookupError:
        return moment + UNREADABLE
    return opening if opening > moment else None


def sendable_from(obstacle: Obstacle) -> datetime | None:
    """Return when sending hours first allow the follow-up, or None if that is unknown.

    The returned time may be in the future. A recorded time that has already passed is returned unchanged. Lateness is
    counted from the returned time, even if sending hours end in the meantime. This function is pure.
    """
    first = obstacle.sendable_from
    if first is None:
        try:
            first = opens_at(obstacle.hours.hours, obstacle.wanted_from) if obstacle.hours else obstacle.wanted_from
        except LookupError:
            return None
    return first if first <= obstacle.now else closed_until(obstacle) or obstacle.send_time


def _open_next(connection: Connection, obstacles: Iterable[Obstacle]) -> None:
    """If the stored sending period has ended, compute the next one."""
    stale: dict[UUID, tuple[WorkspaceHours, datetime]] = {}
    for obstacle in obstacles:
        if obstacle.hours and obstacle.now >= obstacle.hours.open_until:
            stale[obstacle.hours.workspace_id] = (obstacle.hours, obstacle.now)
    for hours, now in stale.values():
        if span := _span(hours, now):
            holds.open_next(connection, hours, span)
        else:
            log.error("sending_hours_unreadable", workspace_id=str(hours.workspace_id), hours=str(hours.hours))


def _span(hours: WorkspaceHours, now: datetime) -> tuple[datetime, datetime] | None:
    try:
        return span_of(hours.hours, now)
    except LookupError:
        return None
