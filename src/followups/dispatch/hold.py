"""Hold: what is paused, or falls outside the sending hours, is put off without using up an attempt."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from followups.quiet_hours import opens_at, span_of
from followups.states import Final, ReasonCode, Status, finish
from followups.store import holds
from followups.store.holds import NEVER, Hold, back_at
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.settings import Settings
    from followups.store.holds import Finding, Hours
    from followups.store.leases import Obstacle

UNREADABLE = timedelta(minutes=1)
"""After which hours are looked at again whose time zone this machine does not know."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Holding:
    """What became of those that could not begin: held, or to be ended. What is in neither is another's matter."""

    held: frozenset[UUID] = frozenset()
    ends: dict[UUID, Final] = field(default_factory=dict)


def hold_back(connection: Connection, settings: Settings, obstacles: Sequence[Obstacle]) -> Holding:
    """Hold those of the leases that a pause or sending hours speak against, and nothing else does."""
    findings = {one.id: one for one in holds.find(connection, [obstacle.lease for obstacle in obstacles])}
    if not findings:
        return Holding()
    _open_next(connection, findings.values())
    decided = [
        (obstacle.lease.id, decide(obstacle, finding, settings.max_lateness))
        for obstacle in obstacles
        if (finding := findings.get(obstacle.lease.id))
    ]
    wanted = [one for _, one in decided if isinstance(one, Hold)]
    held = holds.hold_if_leased(connection, wanted) if wanted else set()
    if held:
        paused = sum(one.pause_id is not None for one in wanted if one.lease.id in held)
        log.info("held", paused=paused, outside_hours=len(held) - paused)
    return Holding(frozenset(held), {id_: one for id_, one in decided if isinstance(one, Final)})


def decide(obstacle: Obstacle, finding: Finding, max_lateness: timedelta) -> Hold | Final | None:
    """Say whether one is held, or ends since it would be held for too long; None: neither. Pure.

    Lateness counts from the first moment at which the sending hours let it be sent.
    """
    if obstacle.chat_removed or obstacle.silence_broken or obstacle.taken_over or obstacle.window_closed:
        return None
    opening = _opening(finding, finding.sent_at)
    reprieve = _reprieve(finding, max_lateness) if obstacle.too_late else None
    if obstacle.too_late and reprieve is None:
        return None
    if finding.pause_id and not reprieve:
        # Behind an earlier one of its chat it waits for that one, as ever.
        return None if obstacle.earlier else Hold(obstacle.lease, NEVER, NEVER, finding.pause_id)
    until = opening or reprieve
    if until is None or finding.hours is None:
        return None
    if finding.window_ends is not None and until >= finding.window_ends:
        return finish(Status.FAILED, ReasonCode.WINDOW_CLOSED, "it ends before the workspace's sending hours open")
    return Hold(obstacle.lease, until, back_at(until, finding.due_date), hours=finding.hours.hours)


def _opening(finding: Finding, moment: datetime) -> datetime | None:
    """Return when the sending hours open that are closed at ``moment``; None when they are open, or there are none."""
    if finding.hours is None:
        return None
    try:
        opening = opens_at(finding.hours.hours, moment)
    except LookupError:
        return moment + UNREADABLE
    return opening if opening > moment else None


def _reprieve(finding: Finding, max_lateness: timedelta) -> datetime | None:
    """Return from when on lateness is to count for one that seems too late; None when it is."""
    since = _opening(finding, finding.lateness_from)
    return since if since and finding.now < since + max_lateness else None


def _open_next(connection: Connection, findings: Iterable[Finding]) -> None:
    """Work out the next time of sending where the one that the database knows is over."""
    stale: dict[UUID, tuple[Hours, datetime]] = {}
    for finding in findings:
        if finding.hours and finding.now >= finding.hours.open_until:
            stale[finding.hours.workspace_id] = (finding.hours, finding.now)
    for hours, now in stale.values():
        if span := _span(hours, now):
            holds.open_next(connection, hours, span)
        else:
            log.error("sending_hours_unreadable", workspace_id=str(hours.workspace_id), hours=str(hours.hours))


def _span(hours: Hours, now: datetime) -> tuple[datetime, datetime] | None:
    try:
        return span_of(hours.hours, now)
    except LookupError:
        return None
