"""Manual changes to workspaces, API keys, pauses, limits and sending hours.

Each change is recorded in the audit log in the same transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from followups.sending_hours import DAYS
from followups.store import api_keys, audit, pauses, quotas, rate_limits, sending_hours, workspaces
from followups.store.audit import Action, Event

if TYPE_CHECKING:
    from datetime import timedelta
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.models import ApiKey, Workspace
    from followups.sending_hours import SendingHours
    from followups.store.audit import Actor


def create_workspace(session: Session, actor: Actor, name: str) -> tuple[Workspace, bool]:
    """Create the workspace. Return the workspace, and whether it is new.

    Raises the same errors as `followups.store.workspaces.create`.
    """
    workspace, new = workspaces.create(session, name)
    if new:
        _record(session, Event(actor, Action.WORKSPACE_CREATED, workspace.id, workspace.id))
    return workspace, new


def create_key(
    session: Session, actor: Actor, workspace_id: UUID, name: str = "", expires: timedelta | None = None
) -> tuple[ApiKey, str]:
    """Create an API key. Return the key's row and the key itself.

    Raises the same errors as `followups.store.api_keys.create`.
    """
    row, key = api_keys.create(session, workspace_id, name, expires)
    details = {"prefix": row.prefix, "expiresAt": row.expires_at and row.expires_at.isoformat()}
    _record(session, Event(actor, Action.API_KEY_CREATED, workspace_id, row.id, details=details))
    return row, key


def revoke_key(session: Session, actor: Actor, key_id: UUID) -> ApiKey:
    """Revoke an API key. Revoking a key twice has no further effect. Raises `ApiKeyNotFoundError`."""
    row = api_keys.revoke(session, key_id)
    if row.revoked_at == session.scalar(select(func.now())):
        details = {"prefix": row.prefix}
        _record(session, Event(actor, Action.API_KEY_REVOKED, row.workspace_id, row.id, details=details))
    return row


def pause(session: Session, actor: Actor, scope: pauses.PauseScope) -> bool:
    """Pause the scope. Return False if the scope was paused already."""
    new = pauses.pause(session.connection(), scope)
    if new:
        _record(session, Event(actor, Action.PAUSE_BEGUN, scope.workspace_id, details={"channel": scope.channel}))
    return new


def resume(session: Session, actor: Actor, scope: pauses.PauseScope) -> bool:
    """End the pause, if there is one; return whether there was one.

    The follow-ups that the pause held are released later, in batches.
    """
    was_paused = pauses.resume(session.connection(), scope)
    if was_paused:
        _record(session, Event(actor, Action.PAUSE_ENDED, scope.workspace_id, details={"channel": scope.channel}))
    return was_paused


def set_limit(session: Session, actor: Actor, scope: rate_limits.LimitScope, rate: float, burst: int) -> None:
    """Set a rate limit, or change the rate limit if the scope already has one."""
    rate_limits.put(session.connection(), scope, rate, burst)
    details = {"channel": scope.channel, "per": scope.per, "rate": rate, "burst": burst}
    _record(session, Event(actor, Action.RATE_LIMIT_SET, scope.workspace_id, details=details))


def clear_limit(session: Session, actor: Actor, scope: rate_limits.LimitScope) -> bool:
    """Remove a rate limit, and return whether there was one."""
    was_set = rate_limits.clear(session.connection(), scope)
    if was_set:
        details = {"channel": scope.channel, "per": scope.per}
        _record(session, Event(actor, Action.RATE_LIMIT_CLEARED, scope.workspace_id, details=details))
    return was_set


def set_quota(session: Session, actor: Actor, workspace_id: UUID, kind: quotas.Kind, most: int) -> None:
    """Set or change a quota, or remove it if ``most`` is negative."""
    connection, details = session.connection(), {"of": kind.value}
    if most >= 0:
        quotas.put(connection, workspace_id, kind, most)
        _record(session, Event(actor, Action.QUOTA_SET, workspace_id, details=details | {"most": most}))
    elif quotas.clear(connection, workspace_id, kind):
        _record(session, Event(actor, Action.QUOTA_CLEARED, workspace_id, details=details))


def set_hours(session: Session, actor: Actor, workspace_id: UUID, hours: SendingHours) -> None:
    """Set the workspace's sending hours. Raises the same errors as `followups.store.sending_hours.put`."""
    sending_hours.put(session, workspace_id, hours)
    details = {
        "timeZone": hours.time_zone,
        "from": f"{hours.opening:%H:%M}",
        "to": f"{hours.closing:%H:%M}",
        "days": [DAYS[day] for day in sorted(hours.days)],
    }
    _record(session, Event(actor, Action.SENDING_HOURS_SET, workspace_id, workspace_id, details=details))


def clear_hours(session: Session, actor: Actor, workspace_id: UUID) -> bool:
    """Remove the workspace's sending hours, and return whether it had any."""
    had_hours = sending_hours.clear(session, workspace_id)
    if had_hours:
        _record(session, Event(actor, Action.SENDING_HOURS_CLEARED, workspace_id, workspace_id))
    return had_hours


def _record(session: Session, event: Event) -> None:
    audit.record(session.connection(), event)
