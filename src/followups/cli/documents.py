"""Rows as JSON documents, with the field names of the API."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from followups.api import schemas
from followups.sending_hours import DAYS
from followups.wording import rfc3339

if TYPE_CHECKING:
    from followups.models import ApiKey, AuditEvent, FailedAttempt, FollowUp, Workspace
    from followups.sending_hours import SendingHours
    from followups.store.pauses import ActivePause
    from followups.store.quotas import QuotaUse
    from followups.store.rate_limits import Limit

MILLISECOND = timedelta(milliseconds=1)


def follow_up_document(follow_up: FollowUp, *, message: bool = False) -> dict[str, Any]:
    """Return a follow-up in the API's JSON form; ``message`` is null unless requested."""
    document = schemas.FollowUp.model_validate(follow_up, from_attributes=True).model_dump(mode="json", by_alias=True)
    return document if message else document | {"message": None}


def workspace_document(workspace: Workspace) -> dict[str, Any]:
    """Return the JSON form of a workspace."""
    return {"id": str(workspace.id), "name": workspace.name, "createdAt": rfc3339(workspace.created_at)}


def hours_document(hours: SendingHours | None) -> dict[str, Any] | None:
    """Return the JSON form of sending hours, or None if every hour is allowed."""
    if hours is None:
        return None
    return {
        "timeZone": hours.time_zone,
        "from": f"{hours.opening:%H:%M}",
        "to": f"{hours.closing:%H:%M}",
        "days": [DAYS[day] for day in sorted(hours.days)],
    }


def pause_document(pause: ActivePause) -> dict[str, Any]:
    """Return the JSON form of a pause.

    A null workspace or channel means all workspaces or all channels.
    """
    return {
        "workspace": pause.workspace,
        "channel": pause.channel,
        "since": rfc3339(pause.since),
        "held": pause.held,
    }


def limit_document(limit: Limit) -> dict[str, Any]:
    """Return the JSON form of a rate limit, in follow-ups per second.

    A null workspace or channel means all workspaces or all channels.
    """
    return {
        "workspace": limit.workspace,
        "channel": limit.channel,
        "each": None if limit.per == "all" else limit.per,
        "rate": limit.rate,
        "burst": limit.burst,
        "since": rfc3339(limit.since),
    }


def quota_document(quota: QuotaUse) -> dict[str, Any]:
    """Return the JSON form of a quota."""
    return {"workspace": quota.workspace, "of": quota.kind.value, "most": quota.most, "now": quota.used}


def failure_document(failure: FailedAttempt) -> dict[str, Any]:
    """Return the JSON form of a failed attempt."""
    return {
        "attempt": failure.number,
        "at": rfc3339(failure.at),
        "outcome": failure.outcome,
        "detail": failure.detail,
        "statusCode": failure.status_code,
        "durationMs": None if failure.duration is None else round(failure.duration / MILLISECOND, 3),
    }


def api_key_document(key: ApiKey, workspace: str) -> dict[str, Any]:
    """Return the JSON form of an API key, with its workspace's name but not the key.

    ``expiresAt`` is present only if the key expires. The JSON form of a key that does not expire is the same as in
    older versions.
    """
    document = {
        "id": str(key.id),
        "name": key.name,
        "prefix": key.prefix,
        "workspace": workspace,
        "createdAt": rfc3339(key.created_at),
        "lastUsedAt": rfc3339(key.last_used_at),
        "revokedAt": rfc3339(key.revoked_at),
    }
    return document | {"expiresAt": rfc3339(key.expires_at)} if key.expires_at else document


def event_document(event: AuditEvent) -> dict[str, Any]:
    """Return the JSON form of an event in the audit log."""
    return {
        "id": str(event.id),
        "at": rfc3339(event.at),
        "way": event.way,
        "actorId": event.actor_id and str(event.actor_id),
        "actor": event.actor,
        "workspaceId": event.workspace_id and str(event.workspace_id),
        "workspace": event.workspace,
        "action": event.action,
        "targetId": event.target_id and str(event.target_id),
        "number": event.number,
        "details": event.details,
    }
