"""The database tables. Times are ``timestamptz`` in UTC, and ids are UUID v4.

A chat's key consists of the workspace's id and the chat's id. A workspace therefore cannot reach another workspace's
chat by guessing ids. Foreign keys to a chat's key make PostgreSQL refuse rows that mix two workspaces.

Row-level security was tried and rejected. With row-level security, creating a follow-up takes 6 % more SQL time, and
listing takes 16 % more (2 cores, 20,000 rows). Row-level security would not restrict the tables' owner, whose URL is
the only one configured. Row-level security would need a second role, which many hosted databases do not allow. With
FORCE ROW LEVEL SECURITY, which includes the owner, the owner's pg_dump would fail. Each query filters by workspace,
which protects reads. A test calls every documented endpoint with another workspace's key and ids.

Only guarded UPDATE statements in `followups.store` write a follow-up's ``status``; the attribute is never assigned. In
Zulip, saving a full row changed a sent message back to pending (zulip#39521).
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
from followups.wording import Sentence

MAX_MESSAGE_LENGTH = 65_536
"""Maximum length of a follow-up's message, in characters."""


CHURNING = {"autovacuum_vacuum_scale_factor": "0.02", "autovacuum_analyze_scale_factor": "0.02"}
"""Storage options of tables from which old rows are deleted.

A search for the oldest rows also reads rows deleted since the last vacuum. By default, a vacuum starts only when a
fifth of a table's rows have been updated or deleted.
"""


WAYS = {
    "api": "API key {actor}",
    "command": "command by {actor}",
    "console": "console, {actor}",
    "python": "Python as {actor}",
    "service": "service {actor}",
}
"""How an audit event names its author, for each way in which a change can be made."""


def readable(*columns: str) -> str:
    """Return an SQL condition that holds only for times that Python can represent.

    A manual change could store a time that Python cannot represent. If a row contains a time that Python cannot
    represent, every query that reads the row fails.
    """
    named = ", ".join(columns)
    return (
        f"LEAST({named}) >= '0002-01-01 00:00:00+00'::timestamptz"
        f" AND GREATEST({named}) < '9999-01-01 00:00:00+00'::timestamptz"
    )


class Base(DeclarativeBase):
    """The base class of all tables: it names the constraints, and sets the types of times and ids."""

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
    """A tenant; every other row belongs to one workspace."""

    __tablename__ = "workspaces"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deletion_began_at: Mapped[datetime | None]
    """The time at which the workspace's deletion began.

    Once the deletion has begun, the workspace accepts no new follow-ups or API keys.
    """


class WorkspaceSendingHours(Base):
    """A row with the sending hours of a workspace (`followups.sending_hours`).

    If a workspace has no row in this table, its messages may be sent at any time. The sending hours have their own
    table, so begin reads no row for them if no workspace has any.
    """

    __tablename__ = "sending_hours"
    __table_args__ = (
        CheckConstraint("days BETWEEN 1 AND 127", name="days_are_a_week_s"),
        # PostgreSQL accepts the time 24:00, but Python does not.
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
    """A bit mask of weekdays, in which bit 0 is Monday."""
    open_from: Mapped[datetime]
    open_until: Mapped[datetime]
    """The end of the current or next sending period. The database compares this time with the current time.

    When a sending period has ended, a worker computes the next period. Workers therefore need time zone data, but the
    database does not.
    """


class Pause(Base):
    """An operator's pause of a workspace, a channel, or one channel of a workspace."""

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
    """The time at which the pause ended.

    The row of an ended pause is deleted once all its held follow-ups have been released.
    """


class RateLimit(Base):
    """A rate limit: the number of attempts that may begin per second.

    A limit applies to all follow-ups, or to those of a workspace, of a channel, or of a channel in a workspace. All
    matching limits apply. The token buckets of each limit are kept in Redis (`followups.flow_control.limiter`).
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
    """The scope of each token bucket: 'all' matching follow-ups together, each 'workspace', or each 'chat'."""
    rate: Mapped[float] = mapped_column(Double)
    """Number of tokens added per second."""
    burst: Mapped[int] = mapped_column(Integer)
    """Number of tokens in a full bucket."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ApiKey(Base):
    """An API key of one workspace. Only the SHA-256 of the key's 256 random bits is stored."""

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
    """The time at which the API key expires, or None if it never expires."""

    @property
    def title(self) -> str:
        """The name and prefix by which people recognise the API key."""
        return f"{self.name} ({self.prefix}…)" if self.name else f"{self.prefix}…"


class Quota(Base):
    """The maximum number of a workspace's pending follow-ups or chats. A workspace without a row has no limit."""

    __tablename__ = "quotas"
    __table_args__ = (
        CheckConstraint("kind IN ('pending', 'chats')", name="kind_is_known"),
        CheckConstraint("most >= 0 AND room BETWEEN 0 AND most", name="room_is_within"),
    )

    workspace_id: Mapped[UUID] = mapped_column(ForeignKey("workspaces.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    most: Mapped[int]
    room: Mapped[int] = mapped_column(server_default=text("0"))
    """How many more rows may be created before the rows are counted again (`followups.store.quotas`)."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Chat(Base):
    """A chat, including its last message and the user's last message."""

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
        # This index speeds up the check that no other workspace uses an external id.
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
    """The author and time of a message in a chat. The message's text is neither accepted nor stored."""

    __tablename__ = "chat_messages"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id", "chat_id"], ["chats.workspace_id", "chats.id"]),
        CheckConstraint("role IN ('user', 'agent', 'operator')", name="role_is_known"),
        Index(None, "workspace_id", "chat_id", "created_at"),
        # Pruning uses this index to delete the oldest messages first.
        Index(None, "created_at"),
        {"postgresql_with": CHURNING},
    )

    workspace_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    chat_id: Mapped[UUID]
    role: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class FollowUp(Base):
    """A message to send into a chat at its due time; each row is one job.

    The columns after ``trigger_chat_message_id`` hold the dispatcher's state. No index contains the lease columns, so
    leases are acquired and returned by heap-only updates.
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
        # The claim's index lists follow-ups in the order of their due times. The index excludes follow-ups that wait
        # for an earlier one in their chat. An index with waiting follow-ups would make claims lease follow-ups that
        # cannot begin yet.
        Index(
            "ix_follow_ups_due",
            text("COALESCE(next_attempt_at, due_date)"),
            "id",
            postgresql_where=text("status = 'pending' AND waits_for IS NULL"),
        ),
        # The fair claim (`followups.store.claims`) uses this index, which sorts pending follow-ups by workspace.
        Index(
            "ix_follow_ups_due_by_workspace",
            "workspace_id",
            text("COALESCE(next_attempt_at, due_date)"),
            "id",
            postgresql_where=text("status = 'pending' AND waits_for IS NULL"),
        ),
        # This index orders the follow-ups of a chat, and finds those that a reply cancels.
        Index(
            "ix_follow_ups_chat_order",
            "workspace_id",
            "chat_id",
            "due_date",
            "id",
            postgresql_where=text("status = 'pending'"),
        ),
        Index("ix_follow_ups_waits_for", "waits_for", postgresql_where=text("waits_for IS NOT NULL")),
        # This index serves the API's lists, newest first (`followups.store.listing`). A list without a filter merges
        # the lists of the four states, so no second index is needed.
        Index("ix_follow_ups_list", "workspace_id", "status", text("created_at DESC"), "id"),
        Index("ix_follow_ups_list_chat", "workspace_id", "chat_id", text("created_at DESC"), "id"),
        Index("ix_follow_ups_trigger", "workspace_id", "trigger_chat_message_id"),
        Index(
            "ix_follow_ups_chat_message",
            "workspace_id",
            "chat_message_id",
            postgresql_where=text("chat_message_id IS NOT NULL"),
        ),
        # This index finds follow-ups that ended recently (lag, throughput, retries) or long ago (pruning). New entries
        # are added at the index's right edge. Follow-ups that are settled together have the same index key.
        Index("ix_follow_ups_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
        Index("ix_follow_ups_retry_of", "retry_of", unique=True, postgresql_where=text("retry_of IS NOT NULL")),
        # This index contains only follow-ups held by a pause or by sending hours. The index is usually empty.
        Index("ix_follow_ups_paused", "pause_id", postgresql_where=text("pause_id IS NOT NULL AND status = 'pending'")),
        Index(
            "ix_follow_ups_quiet",
            "workspace_id",
            "held_until",
            postgresql_where=text("held_until IS NOT NULL AND status = 'pending'"),
        ),
        {
            # Free space on each page lets a row stay on its page when its lease changes. The table of follow-ups is
            # updated often, so it is vacuumed early.
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
    """The time at which the due date or the chat was last set.

    Lateness is counted from ``scheduled_at`` or from the due date, whichever is later. If a due date is set to a time
    in the past, the follow-up is due at once but not yet late.
    """
    next_attempt_at: Mapped[datetime | None]
    """The time of the next attempt, or None if the next attempt is made at the due date."""
    waits_for: Mapped[UUID | None]
    """The id of the chat's earlier follow-up, which must end before this follow-up can be sent."""
    lease_token: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """The fencing token of the lease. The token only increases and is never reused.

    A write with an older token is rejected.
    """
    lease_until: Mapped[datetime | None]
    begun_at: Mapped[datetime | None]
    """The time at which the attempt in flight began, or None."""
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    losses: Mapped[int] = mapped_column(Integer, server_default="0")
    """The number of lost leases: leases that expired with an attempt in flight."""
    snoozes: Mapped[int] = mapped_column(Integer, server_default="0")
    cancel_requested: Mapped[str | None]
    """The reason for a cancellation that was requested during an attempt.

    If the attempt fails, the follow-up is not retried.
    """
    accepted_at: Mapped[datetime | None]
    """The time at which the transport accepted the message, according to the database's clock.

    Lag is the time of acceptance minus the due date.
    """
    accepted_duration: Mapped[timedelta | None]
    """How long the successful attempt took, or None if it was not timed."""
    created_by_key: Mapped[UUID | None]
    """The API key that created the follow-up, or None if it was created without an API key."""
    traceparent: Mapped[str | None]
    """The W3C traceparent under which the follow-up was created, or None."""

    held_until: Mapped[datetime | None]
    """The start of the sending hours that the follow-up last waited for."""
    sendable_from: Mapped[datetime | None]
    """The first time at which sending hours allow the message, or None if the follow-up was never held.

    A time in the future is recomputed from the current sending hours. A time in the past is kept, even if the sending
    hours change. A follow-up's lateness is counted from this time.
    """
    limited_until: Mapped[datetime | None]
    """When the next attempt is made, if a rate limit or the breaker has deferred it.

    While ``next_attempt_at`` equals ``limited_until``, the follow-up waits for a rate limit or the breaker.
    """
    pause_id: Mapped[UUID | None]
    """The id of the pause that holds the follow-up, or None.

    Claims skip a held follow-up, because its next attempt is set far in the future.
    """
    retry_of: Mapped[UUID | None]
    """The failed follow-up that this follow-up retries. At most one follow-up retries a given failed follow-up."""

    @property
    def in_flight(self) -> bool:
        """Whether an attempt has begun and its outcome has not been recorded yet."""
        return self.status == Status.PENDING and self.begun_at is not None


class FailedAttempt(Base):
    """An attempt whose outcome was not `sent`, kept to explain the follow-up's history."""

    __tablename__ = "failed_attempts"
    __table_args__ = (Index(None, "follow_up_id", "id"), {"postgresql_with": CHURNING})

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    follow_up_id: Mapped[UUID] = mapped_column(ForeignKey("follow_ups.id", ondelete="CASCADE"))
    number: Mapped[int]
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    outcome: Mapped[str]
    """The outcome of the attempt: retry, snoozed, rejected, unknown or lost."""
    detail: Mapped[str]
    status_code: Mapped[int | None]
    duration: Mapped[timedelta | None]
    """The duration of the attempt, or None if the worker was lost before recording it."""


class IdempotencyKey(Base):
    """The stored response to a request with an Idempotency-Key, written in that request's transaction."""

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
    # Every process updates rows of this table each second. Half of each page stays free, so that an updated row stays
    # in its page.
    __table_args__ = ({"postgresql_with": {"fillfactor": "50"}},)

    sample: Mapped[str] = mapped_column(primary_key=True)
    labels: Mapped[str] = mapped_column(primary_key=True)
    """The sample's labels as a JSON object with sorted keys."""
    value: Mapped[float] = mapped_column(Double)


class ConsoleSession(Base):
    """The session of a person who is signed in to the console.

    Only the SHA-256 of the cookie's 256 random bits is stored.
    """

    __tablename__ = "console_sessions"
    __table_args__ = (
        CheckConstraint("role IN ('viewer', 'agent', 'admin', 'operator')", name="role_is_known"),
        CheckConstraint("role <> 'operator' OR workspace_id IS NULL", name="operator_sees_all"),
        CheckConstraint("chat_id IS NULL OR workspace_id IS NOT NULL", name="chat_has_workspace"),
        Index(None, "workspace_id", "created_at"),
        # This index is used when old rows are deleted.
        Index(None, "expires_at"),
        {"postgresql_with": CHURNING},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    token_hash: Mapped[bytes] = mapped_column(unique=True)
    role: Mapped[str]
    workspace_id: Mapped[UUID | None] = mapped_column(ForeignKey("workspaces.id", ondelete="CASCADE"))
    """The workspace that the session is limited to, or None for all workspaces."""
    chat_id: Mapped[UUID | None]
    """The only chat that the person may see, or None if the person may see all chats."""
    way: Mapped[str]
    """How the person signed in: key, link or proxy."""
    name: Mapped[str]
    """The person's name, if known.

    The person's name comes from the API key, the link's creator, or the proxy.
    """
    api_key_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"), index=True)
    """The API key with which the person signed in. The session is valid only while this API key is valid."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]


class ConsoleLink(Base):
    """A link that signs a person in once. Only the SHA-256 of the link's token is stored."""

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
    """The name of the person or program that created the link."""
    api_key_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class BulkAction(Base):
    """A bulk action that cancels or retries many follow-ups; workers carry it out in batches."""

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
    """The follow-ups that the action applies to: a filter, or a list of ids."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """The time at which the action was created. The bulk action ignores follow-ups created later."""
    created_by: Mapped[str]
    expected: Mapped[int] = mapped_column(Integer)
    """The number of matching follow-ups in the preview, counted up to a limit."""
    ended_at_time: Mapped[datetime | None]
    ended_at_id: Mapped[UUID | None]
    """The follow-up at which the most recent batch ended. Batches process the list from the newest follow-up to the
    oldest.
    """
    done: Mapped[int] = mapped_column(Integer, server_default="0")
    passed_over: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default="{}")
    """The number of skipped follow-ups, by reason."""
    stopped_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class DispatcherState(Base):
    """A table with one row, which records when the last dispatcher tick ran.

    Each claim locks the table's only row (`followups.store.last_tick`).
    """

    __tablename__ = "dispatcher_state"
    __table_args__ = (CheckConstraint("id = 1", name="only_one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, server_default="1")
    last_tick_at: Mapped[datetime | None]
    grace_until: Mapped[datetime | None]
    """The end of the grace period that follows a gap in the ticks.

    During the grace period, no other worker claims an expired lease with an attempt in flight.
    """


class AuditEvent(Base):
    """An audit event: one manual change or one bulk command (`followups.store.audit`).

    An audit event contains no message text. The table has no foreign keys, because an event must remain when its object
    is deleted.
    """

    __tablename__ = "audit_events"
    __table_args__ = (
        CheckConstraint("way IN ('api', 'command', 'console', 'python', 'service')", name="way_is_known"),
        CheckConstraint("number >= 0", name="number_is_a_count"),
        # These indexes serve three lists: all events, a workspace's events, and a follow-up's timeline.
        Index("ix_audit_events_at", "at", "id"),
        Index("ix_audit_events_workspace", "workspace_id", "at", "id"),
        Index("ix_audit_events_target", "target_id", postgresql_where=text("target_id IS NOT NULL")),
        {"postgresql_with": CHURNING},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4, server_default=func.gen_random_uuid())
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    way: Mapped[str]
    """Where the change came from: REST API, command, console, Python, or the service itself."""
    actor_id: Mapped[UUID | None]
    """The id of the API key or console session, or None for an operating-system user."""
    actor: Mapped[str]
    """The actor's name at the time of the event."""
    workspace_id: Mapped[UUID | None]
    workspace: Mapped[str | None]
    """The workspace's name when the event happened, or None if the event concerns all workspaces."""
    action: Mapped[str]
    target_id: Mapped[UUID | None]
    """The changed follow-up, API key, chat or workspace; None for a target without an id."""
    number: Mapped[int] = mapped_column(BigInteger, server_default="1")
    """The number of rows that were changed."""
    details: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default="{}")

    @property
    def by(self) -> Sentence:
        """The author and the means of access: "API key website (fup_3Fq8vTnO…)", "command by root"."""
        return Sentence(WAYS[self.way], actor=self.actor or self.actor_id)
