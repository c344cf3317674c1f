"""Audit events, which record each manual change and bulk command with its author.

Each event is recorded in the same transaction as the change. Audit events contain no message texts, and no reasons in a
caller's own words.
"""

from __future__ import annotations

import json
import os
import pwd
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from sqlalchemy import select, text, tuple_

from followups.models import AuditEvent
from followups.statements import Rule, Statement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from followups.statements import Steps


class Way(StrEnum):
    """How an actor used the service."""

    API = "api"
    COMMAND = "command"
    CONSOLE = "console"
    PYTHON = "python"
    SERVICE = "service"


@dataclass(frozen=True, slots=True)
class Actor:
    """The author of a change: an API key, a console session or an operating-system user.

    API keys and console sessions are identified by id, operating-system users by name. The INSERT reads an omitted name
    or prefix from the API key's row.
    """

    way: Way
    id: UUID | None = None
    name: str = ""


SERVICE = Actor(Way.SERVICE, name="followups")
"""The author of events that no user causes, such as an API key's expiry."""


@lru_cache
def user_of_process(way: Way) -> Actor:
    """Return the operating-system user of this process as the author of a change."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # a container may run under a uid that has no user name
        name = f"uid {uid}"
    return Actor(way, name=name)


class Action(StrEnum):
    """The recorded action: singular for an action on one object, plural for a bulk command."""

    FOLLOW_UP_CREATED = "follow_up.created"
    FOLLOW_UP_CHANGED = "follow_up.changed"
    FOLLOW_UP_ENDED = "follow_up.ended"
    FOLLOW_UP_RETRIED = "follow_up.retried"
    FOLLOW_UPS_CANCELLED = "follow_ups.cancelled"
    FOLLOW_UPS_RETRIED = "follow_ups.retried"
    FOLLOW_UPS_PRUNED = "follow_ups.pruned"
    MESSAGES_SHOWN = "messages.shown"
    CHAT_REMOVED = "chat.removed"
    CHAT_DELETED = "chat.deleted"
    WORKSPACE_CREATED = "workspace.created"
    WORKSPACE_DELETED = "workspace.deleted"
    API_KEY_CREATED = "api_key.created"
    API_KEY_REVOKED = "api_key.revoked"
    API_KEY_EXPIRED = "api_key.expired"
    CONSOLE_LINK_CREATED = "console_link.created"
    PAUSE_BEGUN = "pause.begun"
    PAUSE_ENDED = "pause.ended"
    RATE_LIMIT_SET = "rate_limit.set"
    RATE_LIMIT_CLEARED = "rate_limit.cleared"
    QUOTA_SET = "quota.set"
    QUOTA_CLEARED = "quota.cleared"
    SENDING_HOURS_SET = "sending_hours.set"
    SENDING_HOURS_CLEARED = "sending_hours.cleared"


@dataclass(frozen=True, slots=True)
class Event:
    """An audit event: one manual change, or one bulk command.

    Each batch of a bulk command records the same event with its own ``number``. The event's row contains the sum of
    these numbers.
    """

    actor: Actor
    action: Action
    workspace_id: UUID | None = None
    target_id: UUID | None = None
    number: int = 1
    details: Mapping[str, object] = field(default_factory=dict)
    id: UUID = field(default_factory=uuid4)

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters of the INSERT statement."""
        return {
            "id": self.id,
            "way": self.actor.way.value,
            "actor_id": self.actor.id,
            "actor": self.actor.name,
            "workspace_id": self.workspace_id,
            "action": self.action.value,
            "target_id": self.target_id,
            "number": self.number,
            "details": json.dumps(self.details, default=str),
        }


_RECORD = Statement("""
    INSERT INTO audit_events (id, way, actor_id, actor, workspace_id, workspace, action, target_id, number, details)
    VALUES (CAST(:id AS uuid), :way, CAST(:actor_id AS uuid),
            COALESCE(NULLIF(:actor, ''),
                     (SELECT CASE WHEN name = '' THEN prefix || '…' ELSE name || ' (' || prefix || '…)' END
                        FROM api_keys WHERE id = CAST(:actor_id AS uuid)), ''),
            CAST(:workspace_id AS uuid), (SELECT name FROM workspaces WHERE id = CAST(:workspace_id AS uuid)),
            :action, CAST(:target_id AS uuid), :number, CAST(:details AS jsonb))
    ON CONFLICT (id) DO UPDATE SET number = audit_events.number + excluded.number
""")


@Rule
def record(event: Event) -> Steps[None]:
    """Record the audit event in this transaction, or increase the count of its existing row."""
    yield _RECORD(**event.parameters)


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """A filter for audit events; fields that are None or empty are ignored."""

    workspace_id: UUID | None = None
    workspace: str | None = None
    """The workspace's name, by which its audit events are found even after the workspace is deleted."""
    since: datetime | None = None
    actions: Sequence[Action] = ()
    target_id: UUID | None = None


def newest(
    session: Session, wanted: AuditFilter, limit: int, before: tuple[datetime, UUID] | None = None
) -> Sequence[AuditEvent]:
    """Return the newest audit events, newest first.

    ``before`` is an event's time and id; only older events are returned.
    """
    query = select(AuditEvent).order_by(AuditEvent.at.desc(), AuditEvent.id.desc()).limit(limit)
    if wanted.workspace_id:
        query = query.where(AuditEvent.workspace_id == wanted.workspace_id)
    if wanted.workspace is not None:
        query = query.where(AuditEvent.workspace == wanted.workspace.strip())
    if wanted.since:
        query = query.where(AuditEvent.at >= wanted.since)
    if wanted.actions:
        query = query.where(AuditEvent.action.in_([action.value for action in wanted.actions]))
    if wanted.target_id:
        query = query.where(AuditEvent.target_id == wanted.target_id)
    if before:
        query = query.where(tuple_(AuditEvent.at, AuditEvent.id) < before)
    return session.scalars(query).all()


_DELETE_OLD = text("""
    WITH old AS MATERIALIZED (
        SELECT id FROM audit_events WHERE at < :before ORDER BY at, id LIMIT :most FOR UPDATE SKIP LOCKED
    )
    DELETE FROM audit_events a USING old WHERE a.id = old.id
""")


def delete_old(connection: Connection, before: datetime, most: int) -> int:
    """Delete up to ``most`` audit events older than ``before``, oldest first; return how many were deleted."""
    return connection.execute(_DELETE_OLD, {"before": before, "most": most}).rowcount


# The audit event has the same id as the API key, so each expiry is recorded only once.
_EXPIRED = text("""
    INSERT INTO audit_events (id, at, way, actor, workspace_id, workspace, action, target_id, details)
    SELECT k.id, k.expires_at, :way, :actor, k.workspace_id, w.name, :action, k.id,
           jsonb_build_object('prefix', k.prefix)
      FROM api_keys k JOIN workspaces w ON w.id = k.workspace_id
     WHERE k.expires_at <= now() AND k.expires_at >= CAST(:since AS timestamptz)
       AND (k.revoked_at IS NULL OR k.revoked_at > k.expires_at)
    ON CONFLICT DO NOTHING
""")


def record_expired_keys(connection: Connection, since: datetime) -> int:
    """Record the API keys that have expired since the given time; return how many were recorded.

    Each expiry is recorded only once.
    """
    parameters = {"way": SERVICE.way.value, "actor": SERVICE.name, "action": Action.API_KEY_EXPIRED.value}
    return connection.execute(_EXPIRED, parameters | {"since": since}).rowcount
