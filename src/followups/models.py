"""The tables. Times are ``timestamptz`` in UTC, ids UUID v4.

A chat's key is workspace and id together, so that no workspace reaches another's chat by guessing ids. The foreign keys
onto it make PostgreSQL refuse a row that would join two workspaces. Row-level security was tried too and left out. It
costs little: 6 % of the SQL time of a create and 16 % of a list (2 cores, 20,000 rows). But the tables' owner is exempt
from it, and we have one URL, the owner's. So it needs either a second role, which many hosted databases do not let you
create, or FORCE, under which the owner's own pg_dump fails. Reads are protected by the predicate of each query, and by
a test that calls every endpoint of the document with another workspace's key and ids.

``status`` of a follow-up is written by guarded UPDATE statements in `followups.store` only, never by assigning to an
object here: in another system a full-row save brought a sent message back to pending (zulip#39521).
"""

from __future__ import annotations

from datetime import datetime, time, timedelta
from typing import Any, ClassVar
from uuid import UUID, uuid4

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    SmallInteger,
    Text,
    Time,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from followups.states import Status

MAX_MESSAGE_LENGTH = 65_536
"""Most characters of a follow-up's message."""


CHURNING = {"autovacuum_vacuum_scale_factor": "0.02", "autovacuum_analyze_scale_factor": "0.02"}
"""Storage options of tables whose old rows are deleted by age. A search for the oldest rows reads everything that was
deleted since the last vacuum, which by default waits until a fifth of the table is dead.
"""


def readable(*columns: str) -> str:
    """Return the SQL condition under which Python can represent these times.

    Any other time, written by hand, makes everything fail that reads it.
    """
    named = ", ".join(columns)
    return (
        f"LEAST({named}) >= '0002-01-01 00:00:00+00'::timestamptz"
        f" AND GREATEST({named}) < '9999-01-01 00:00:00+00'::timestamptz"
    )


class Base(DeclarativeBase):
    """What every table shares: names of constraints, and the types of times and ids."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        datetime: DateTime(timezone=True),
        time: Time,
        timedelta: Interval,
        UUID: Uuid,
        str: Text,
        bytes: LargeBinary,
    }


class Workspace(Base):
    """A tenant; every other row belongs to one."""

    __tablename__ = "workspaces"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deletion_began_at: Mapped[datetime | None]
    """When its deletion began; since then it accepts no new follow-ups and keys."""


class WorkspaceSendingHours(Base):
    """The sending hours of a workspace; without a row, messages are sent at any time (`followups.sending_hours`).

    It is a separate table, so that begin reads nothing while no workspace has any.
    """

    __tablename__ = "sending_hours"
    __table_args__ = (
        CheckConstraint("days BETWEEN 1 AND 127", name="days_are_a_week_s"),
        # PostgreSQL accepts 24:00, and Python does not.
        CheckConstraint(
            f"opening < '24:00:00' AND closing < '24:00:00' AND {readable('open_from', 'open_until')}",
            name="times_are_readable",
        ),
    )

    workspace_id: Mapped[UUID] = mapped_column(ForeignKey("workspaces.id"), primary_key=True)
    time_zone: Mapped[str]
    opening: Mapped[time]
    closing: Mapped[time]
    days: Mapped[int] = mapped_column(SmallInteger)
    """Bit 0 is Monday."""
    open_from: Mapped[datetime]
    open_until: Mapped[datetime]
    """The current or next time of sending, which the database compares with. Once it is over, the first worker that is
    refused by it computes the next one. So time zones are known to the workers only, not to the database.
    """


class Pause(Base):
    """What an operator has paused: a workspace, a channel, or a channel of a workspace."""

    __tablename__ = "pauses"
    __table_args__ = (
        CheckConstraint("workspace_id IS NOT NULL OR channel IS NOT NULL", name="names_something"),
        Index(
            "ix_pauses_scope",
            text("COALESCE(workspace_id, '00000000-0000-0000-0000-000000000000'::uuid)"),
            text("COALESCE(channel, '')"),
            unique=True,
            postgresql_where=text("ended_at IS NULL"),
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    workspace_id: Mapped[UUID | None] = mapped_column(ForeignKey("workspaces.id"))
    channel: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]
    """When it ended. The row stays only until everything it paused has been released."""


class RateLimit(Base):
    """How many attempts may begin a second: in total, or of a workspace, a channel, or a channel of a workspace.

    All matching limits apply. The state of their buckets is in Redis (`followups.flow_control.limiter`).
    """

    __tablename__ = "rate_limits"
    __table_args__ = (
        CheckConstraint("per IN ('all', 'workspace', 'chat')", name="per_is_known"),
        CheckConstraint("rate > 0 AND rate <= 1000000", name="rate_is_a_rate"),
        CheckConstraint("burst BETWEEN 1 AND 1000000", name="burst_lets_one_go"),
        Index(
            "ix_rate_limits_scope",
            text("COALESCE(workspace_id, '00000000-0000-0000-0000-000000000000'::uuid)"),
            text("COALESCE(channel, '')"),
            "per",
            unique=True,
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    workspace_id: Mapped[UUID | None] = mapped_column(ForeignKey("workspaces.id"))
    channel: Mapped[str | None]
    per: Mapped[str]
    """One bucket for 'all' matching follow-ups, one for each 'workspace', or one for each 'chat'."""
    rate: Mapped[float] = mapped_column(Double)
    """Tokens a second."""
    burst: Mapped[int] = mapped_column(Integer)
    """Tokens that a full bucket holds."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ApiKey(Base):
    """A key to one workspace; only the SHA-256 of its 256 random bits is stored."""

    __tablename__ = "api_keys"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    workspace_id: Mapped[UUID] = mapped_column(ForeignKey("workspaces.id"), index=True)
    name: Mapped[str] = mapped_column(server_default="")
    prefix: Mapped[str]
    key_hash: Mapped[bytes] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    """When it expires, or None if it never does."""


class Quota(Base):
    """The most pending follow-ups, or chats, that a workspace may have; without a row there is no limit."""

    __tablename__ = "quotas"
    __table_args__ = (
        CheckConstraint("kind IN ('pending', 'chats')", name="kind_is_known"),
        CheckConstraint("most >= 0 AND room BETWEEN 0 AND most", name="room_is_within"),
    )

    workspace_id: Mapped[UUID] = mapped_column(ForeignKey("workspaces.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    most: Mapped[int]
    room: Mapped[int] = mapped_column(server_default=text("0"))
    """How many more may be created before they are counted again (`followups.store.quotas`)."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Chat(Base):
    """A chat, with the last message and the user's last message."""

    __tablename__ = "chats"
    __table_args__ = (
        CheckConstraint(
            "channel IN ('widget', 'waha', 'whatsapp', 'instagram', 'api', 'matrix')", name="channel_is_known"
        ),
        CheckConstraint(
            "(last_message_id IS NULL) = (last_message_at IS NULL)"
            " AND (last_message_id IS NULL) = (last_message_role IS NULL)",
            name="last_message_is_whole",
        ),
        CheckConstraint(readable("last_message_at", "last_user_message_at"), name="times_are_readable"),
        # For the check whether another workspace has this external id.
        Index(None, "external_id", postgresql_where=text("external_id IS NOT NULL")),
    )

    workspace_id: Mapped[UUID] = mapped_column(ForeignKey("workspaces.id"), primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    channel: Mapped[str] = mapped_column(server_default="api")
    external_id: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    removed_at: Mapped[datetime | None]
    last_message_id: Mapped[UUID | None]
    last_message_role: Mapped[str | None]
    last_message_at: Mapped[datetime | None]
    last_user_message_at: Mapped[datetime | None]


class ChatMessage(Base):
    """Who wrote in a chat, and when. The message text is neither accepted nor stored."""

    __tablename__ = "chat_messages"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id", "chat_id"], ["chats.workspace_id", "chats.id"]),
        CheckConstraint("role IN ('user', 'agent', 'operator')", name="role_is_known"),
        Index(None, "workspace_id", "chat_id", "created_at"),
        # What pruning deletes, oldest first.
        Index(None, "created_at"),
        {"postgresql_with": CHURNING},
    )

    workspace_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    chat_id: Mapped[UUID]
    role: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class FollowUp(Base):
    """One message to be sent into one chat at its due date: the row is the job.

    The columns below ``trigger_chat_message_id`` belong to the dispatcher. Lease columns are in no index, so that
    taking and returning a lease is a heap-only update.
    """

    __tablename__ = "follow_ups"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id", "chat_id"], ["chats.workspace_id", "chats.id"]),
        CheckConstraint("status IN ('pending', 'sent', 'failed', 'cancelled')", name="status_is_known"),
        CheckConstraint("(status = 'pending') = (finished_at IS NULL)", name="final_has_finished_at"),
        CheckConstraint("(status IN ('failed', 'cancelled')) = (reason IS NOT NULL)", name="reason_explains"),
        CheckConstraint(f"char_length(message) BETWEEN 1 AND {MAX_MESSAGE_LENGTH}", name="message_has_text"),
        CheckConstraint(
            "due_date >= '0002-01-01 00:00:00+00' AND due_date < '9999-01-01 00:00:00+00'", name="due_date_is_readable"
        ),
        CheckConstraint(
            readable(
                "scheduled_at",
                "next_attempt_at",
                "lease_until",
                "begun_at",
                "accepted_at",
                "held_until",
                "sendable_from",
                "limited_until",
            ),
            name="times_are_readable",
        ),
        CheckConstraint("attempts >= 0 AND losses >= 0 AND snoozes >= 0", name="budgets_are_counts"),
        CheckConstraint("begun_at IS NULL OR lease_until IS NOT NULL", name="begun_holds_lease"),
        CheckConstraint("waits_for IS NULL OR status = 'pending'", name="waiting_is_pending"),
        # The claim's index: due follow-ups, oldest first. Follow-ups that wait for an earlier one of their chat are not
        # in it, so they are not scanned, claimed and refused again and again.
        Index(
            "ix_follow_ups_due",
            text("COALESCE(next_attempt_at, due_date)"),
            "id",
            postgresql_where=text("status = 'pending' AND waits_for IS NULL"),
        ),
        # The same for each workspace, for the fair claim (`followups.store.claims`).
        Index(
            "ix_follow_ups_due_by_workspace",
            "workspace_id",
            text("COALESCE(next_attempt_at, due_date)"),
            "id",
            postgresql_where=text("status = 'pending' AND waits_for IS NULL"),
        ),
        # Order in a chat: whether there is an earlier one, and which; what a reply cancels.
        Index(
            "ix_follow_ups_chat_order",
            "workspace_id",
            "chat_id",
            "due_date",
            "id",
            postgresql_where=text("status = 'pending'"),
        ),
        Index("ix_follow_ups_waits_for", "waits_for", postgresql_where=text("waits_for IS NOT NULL")),
        # The API's lists, newest first (`followups.store.listing`). Without a filter a list merges the four states, so
        # that this one index serves both.
        Index("ix_follow_ups_list", "workspace_id", "status", text("created_at DESC"), "id"),
        Index("ix_follow_ups_list_chat", "workspace_id", "chat_id", text("created_at DESC"), "id"),
        Index("ix_follow_ups_trigger", "workspace_id", "trigger_chat_message_id"),
        Index(
            "ix_follow_ups_chat_message",
            "workspace_id",
            "chat_message_id",
            postgresql_where=text("chat_message_id IS NOT NULL"),
        ),
        # What ended recently (lag and throughput, what to retry), and what ended long ago (pruning). New entries go to
        # its right edge, and those of one settlement share their key.
        Index("ix_follow_ups_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
        Index("ix_follow_ups_retry_of", "retry_of", unique=True, postgresql_where=text("retry_of IS NOT NULL")),
        # Paused follow-ups and those that wait for sending hours; otherwise empty.
        Index("ix_follow_ups_paused", "pause_id", postgresql_where=text("pause_id IS NOT NULL AND status = 'pending'")),
        Index(
            "ix_follow_ups_quiet",
            "workspace_id",
            "held_until",
            postgresql_where=text("held_until IS NOT NULL AND status = 'pending'"),
        ),
        {
            # Room on each page for lease updates in place; this table is updated a lot, so it is vacuumed early.
            "postgresql_with": {
                "fillfactor": "85",
                "autovacuum_vacuum_scale_factor": "0.02",
                "autovacuum_analyze_scale_factor": "0.02",
            },
        },
    )
    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    workspace_id: Mapped[UUID]
    chat_id: Mapped[UUID]
    chat_message_id: Mapped[UUID | None]
    due_date: Mapped[datetime]
    message: Mapped[str]
    status: Mapped[Status] = mapped_column(Text, server_default="pending")
    reason: Mapped[str | None]
    finished_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    trigger_chat_message_id: Mapped[UUID]

    scheduled_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """When the due date or the chat was last set.

    Lateness counts from the later of this time and the due date, so that a due date in the past means at once, not too
    late.
    """
    next_attempt_at: Mapped[datetime | None]
    """When to try again after a retry or a deferral, or None for the due date."""
    waits_for: Mapped[UUID | None]
    """The earlier follow-up of its chat whose end unblocks it."""
    lease_token: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """The fencing token, which only grows and never repeats.

    A write with an older token is refused.
    """
    lease_until: Mapped[datetime | None]
    begun_at: Mapped[datetime | None]
    """When the attempt in flight began, or None."""
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    losses: Mapped[int] = mapped_column(Integer, server_default="0")
    """Lost leases: those that ran out with an attempt in flight."""
    snoozes: Mapped[int] = mapped_column(Integer, server_default="0")
    cancel_requested: Mapped[str | None]
    """The reason of a cancel that came during an attempt in flight: it is not retried."""
    accepted_at: Mapped[datetime | None]
    """When the transport accepted it, by the database's clock; lag is this minus the due date."""
    traceparent: Mapped[str | None]
    """The W3C traceparent of the trace in which it was created, or None."""

    held_until: Mapped[datetime | None]
    """The opening of the sending hours until which the follow-up was last held."""
    sendable_from: Mapped[datetime | None]
    """The first time at which the sending hours allow the sending, or None before any hold.

    A time in the future follows from the current sending hours. A time in the past stays, even if they change. Lateness
    counts from this moment.
    """
    limited_until: Mapped[datetime | None]
    """The next attempt as set by a rate limit or the breaker.

    While ``next_attempt_at`` has the same value, the follow-up waits for the rate limit or the breaker.
    """
    pause_id: Mapped[UUID | None]
    """The pause that stops it; its next attempt is then far in the future, out of the claim's range."""
    retry_of: Mapped[UUID | None]
    """The follow-up that this one retries; each is retried once at most."""

    @property
    def in_flight(self) -> bool:
        """Whether an attempt has begun whose outcome is not recorded yet."""
        return self.status == Status.PENDING and self.begun_at is not None


class FailedAttempt(Base):
    """One attempt that did not end in `sent`, kept as an explanation."""

    __tablename__ = "failed_attempts"
    __table_args__ = (Index(None, "follow_up_id", "id"), {"postgresql_with": CHURNING})

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    follow_up_id: Mapped[UUID] = mapped_column(ForeignKey("follow_ups.id", ondelete="CASCADE"))
    number: Mapped[int]
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    outcome: Mapped[str]
    """retry, snoozed, rejected, unknown or lost"""
    detail: Mapped[str]
    status_code: Mapped[int | None]
    duration: Mapped[timedelta | None]
    """None if the worker was lost, since its attempt was not timed."""


class IdempotencyKey(Base):
    """The answer to a request with an Idempotency-Key, written in that request's transaction."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index(None, "created_at"), {"postgresql_with": CHURNING})

    workspace_id: Mapped[UUID] = mapped_column(ForeignKey("workspaces.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_hash: Mapped[bytes]
    status: Mapped[int]
    location: Mapped[str | None]
    body: Mapped[bytes]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class MetricTotal(Base):
    """One sample of a counter or a histogram, summed over all processes."""

    __tablename__ = "metric_totals"
    # Updated every second by every process, so each page has room for updates in place.
    __table_args__ = ({"postgresql_with": {"fillfactor": "50"}},)

    sample: Mapped[str] = mapped_column(primary_key=True)
    labels: Mapped[str] = mapped_column(primary_key=True)
    """A JSON object with sorted keys."""
    value: Mapped[float] = mapped_column(Double)


class ConsoleSession(Base):
    """A person who has signed in to the console; only the SHA-256 of the cookie's 256 random bits is stored."""

    __tablename__ = "console_sessions"
    __table_args__ = (
        CheckConstraint("role IN ('viewer', 'agent', 'admin', 'operator')", name="role_is_known"),
        CheckConstraint("role <> 'operator' OR workspace_id IS NULL", name="operator_sees_all"),
        CheckConstraint("chat_id IS NULL OR workspace_id IS NOT NULL", name="chat_has_workspace"),
        Index(None, "workspace_id", "created_at"),
        # What pruning deletes.
        Index(None, "expires_at"),
        {"postgresql_with": CHURNING},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    token_hash: Mapped[bytes] = mapped_column(unique=True)
    role: Mapped[str]
    workspace_id: Mapped[UUID | None] = mapped_column(ForeignKey("workspaces.id", ondelete="CASCADE"))
    """None means all workspaces."""
    chat_id: Mapped[UUID | None]
    """The one chat that the person may see, or None for all chats."""
    way: Mapped[str]
    """How the person signed in: key, link or proxy."""
    name: Mapped[str]
    """Who it is, if known: the name of the key or of the link's creator, or the name from the proxy."""
    api_key_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"), index=True)
    """The key with which the person signed in; the session ends with it."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]


class ConsoleLink(Base):
    """A link that signs in once; only the SHA-256 of its token is stored."""

    __tablename__ = "console_links"
    __table_args__ = (
        CheckConstraint("role IN ('viewer', 'agent', 'admin', 'operator')", name="role_is_known"),
        CheckConstraint("role <> 'operator' OR workspace_id IS NULL", name="operator_sees_all"),
        CheckConstraint("chat_id IS NULL OR workspace_id IS NOT NULL", name="chat_has_workspace"),
        Index(None, "expires_at"),
    )

    token_hash: Mapped[bytes] = mapped_column(primary_key=True)
    role: Mapped[str]
    workspace_id: Mapped[UUID | None] = mapped_column(ForeignKey("workspaces.id", ondelete="CASCADE"), index=True)
    chat_id: Mapped[UUID | None]
    name: Mapped[str]
    """Who made it."""
    api_key_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class BulkAction(Base):
    """Many follow-ups to cancel or retry, carried out by the workers in batches."""

    __tablename__ = "bulk_actions"
    __table_args__ = (
        CheckConstraint("kind IN ('cancel', 'retry')", name="kind_is_known"),
        Index(None, "created_at"),
        Index("ix_bulk_actions_open", "created_at", "id", postgresql_where=text("finished_at IS NULL")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    workspace_id: Mapped[UUID | None] = mapped_column(ForeignKey("workspaces.id", ondelete="CASCADE"), index=True)
    kind: Mapped[str]
    chosen: Mapped[dict[str, Any]] = mapped_column(JSONB)
    """The filter, or the ids that were ticked."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """Follow-ups that are created later are left alone."""
    created_by: Mapped[str]
    expected: Mapped[int] = mapped_column(Integer)
    """How many matched at the preview, counted up to a limit."""
    ended_at_time: Mapped[datetime | None]
    ended_at_id: Mapped[UUID | None]
    """Where the last batch ended, in the order of the list: newest first."""
    done: Mapped[int] = mapped_column(Integer, server_default="0")
    passed_over: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default="{}")
    """How many were passed over, by the reason."""
    stopped_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class DispatcherState(Base):
    """The single row that records when a dispatcher last ticked.

    Each claim locks the row (`followups.store.last_tick`).
    """

    __tablename__ = "dispatcher_state"
    __table_args__ = (CheckConstraint("id = 1", name="only_one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, server_default="1")
    last_tick_at: Mapped[datetime | None]
    grace_until: Mapped[datetime | None]
    """The end of the grace period after a gap in the ticks, in which leases in flight are left to their workers."""


class AuditEvent(Base):
    """Who did what: one change by hand, or one bulk command, without any text (`followups.store.audit`).

    It has no foreign keys, since it outlives its target.
    """

    __tablename__ = "audit_events"
    __table_args__ = (
        CheckConstraint("way IN ('api', 'command', 'console', 'python', 'service')", name="way_is_known"),
        CheckConstraint("number >= 0", name="number_is_a_count"),
        # Newest first, everywhere or in a workspace; and the timeline of one follow-up.
        Index("ix_audit_events_at", "at", "id"),
        Index("ix_audit_events_workspace", "workspace_id", "at", "id"),
        Index("ix_audit_events_target", "target_id", postgresql_where=text("target_id IS NOT NULL")),
        {"postgresql_with": CHURNING},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    way: Mapped[str]
    """The actor's way in: the REST API, a command, the console, Python, or the service itself."""
    actor_id: Mapped[UUID | None]
    """The API key or the console session; None for an operating-system user."""
    actor: Mapped[str]
    """The actor's name at that time."""
    workspace_id: Mapped[UUID | None]
    workspace: Mapped[str | None]
    """The workspace's name at that time. None where the event concerns all workspaces."""
    action: Mapped[str]
    target_id: Mapped[UUID | None]
    """The follow-up, API key, chat or workspace that was changed; None where that has no id."""
    number: Mapped[int] = mapped_column(BigInteger, server_default="1")
    """How many were changed."""
    details: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default="{}")
