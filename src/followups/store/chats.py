"""Chats and chat messages.

The lock on a chat's row decides whether a reply or a new follow-up comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from followups.errors import ChatNotFoundError
from followups.models import Chat
from followups.statements import Rule, Statement
from followups.states import ReasonCode
from followups.store import follow_ups, quotas
from followups.store.leases import uuid_array
from followups.store.quotas import Kind

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from followups.channels import Channel
    from followups.statements import Steps


class Role(StrEnum):
    """The author of a chat message."""

    USER = "user"
    AGENT = "agent"
    OPERATOR = "operator"


CANCELLING = {Role.USER: ReasonCode.USER_REPLIED, Role.OPERATOR: ReasonCode.HUMAN_TAKEOVER}
"""The roles whose chat messages cancel pending follow-ups, with the reason for each role."""


@dataclass(frozen=True, slots=True)
class RecordedMessage:
    """A recorded chat message.

    ``new`` is False if the message was already recorded and nothing changed.
    """

    id: UUID
    chat_id: UUID
    role: Role
    created_at: datetime
    cancelled: tuple[UUID, ...]
    new: bool

    @property
    def cancelled_follow_up_ids(self) -> tuple[UUID, ...]:
        """Ids of the follow-ups that the message cancelled; the field has its API name."""
        return self.cancelled


_LOCK = Statement(
    """
    SELECT {columns} FROM chats
     WHERE workspace_id = :workspace_id AND id = :chat_id AND removed_at IS NULL
       AND NOT EXISTS (SELECT FROM workspaces w WHERE w.id = chats.workspace_id AND w.deletion_began_at IS NOT NULL)
       FOR NO KEY UPDATE
    """,
    Chat,
)


@Rule
def lock_chat(workspace_id: UUID, chat_id: UUID) -> Steps[Chat]:
    """Return the chat, locked until the transaction ends.

    Raises `ChatNotFoundError` if the chat is missing, removed, or in a workspace being deleted.
    """
    chats: Sequence[Chat] = yield _LOCK(workspace_id=workspace_id, chat_id=chat_id)
    if not chats:
        raise ChatNotFoundError
    return chats[0]


_LOCK_MANY = Statement(
    """
    SELECT {columns} FROM chats
     WHERE workspace_id = :workspace_id AND id = ANY(CAST(:ids AS uuid[])) AND removed_at IS NULL
       AND NOT EXISTS (SELECT FROM workspaces w WHERE w.id = chats.workspace_id AND w.deletion_began_at IS NOT NULL)
     ORDER BY id
       FOR NO KEY UPDATE
    """,
    Chat,
)


@Rule
def lock_many(workspace_id: UUID, chat_ids: Collection[UUID]) -> Steps[dict[UUID, Chat]]:
    """Lock and return the chats that are not removed, in ascending order of their ids."""
    chats: Sequence[Chat] = yield _LOCK_MANY(workspace_id=workspace_id, ids=uuid_array(chat_ids))
    return {chat.id: chat for chat in chats}


_LOCK_OF = Statement(
    """
    SELECT {columns}
      FROM follow_ups f
      JOIN chats ON chats.workspace_id = f.workspace_id AND chats.id IN (f.chat_id, CAST(:target AS uuid))
     WHERE f.id = :follow_up_id AND f.workspace_id = COALESCE(CAST(:workspace_id AS uuid), f.workspace_id)
     ORDER BY chats.id
       FOR NO KEY UPDATE OF chats
    """,
    Chat,
)


@Rule
def lock_chats_of(follow_up_id: UUID, workspace_id: UUID | None, target: UUID | None) -> Steps[dict[UUID, Chat]]:
    """Lock and return the follow-up's chat and the ``target`` chat, including removed chats.

    The chats stay locked until the transaction ends. A chat that does not exist is left out of the result. For
    operators, ``workspace_id`` is None, and chats of all workspaces are found.
    """
    chats: Sequence[Chat] = yield _LOCK_OF(follow_up_id=follow_up_id, workspace_id=workspace_id, target=target)
    return {chat.id: chat for chat in chats}


_WITHIN_QUOTA = quotas.unless_limited(Kind.CHATS)
_LOCK_ANY = Statement(
    "SELECT {columns} FROM chats WHERE workspace_id = :workspace_id AND id = :chat_id FOR NO KEY UPDATE", Chat
)
_INSERT = Statement(
    f"""
    INSERT INTO chats (workspace_id, id, channel, external_id)
    SELECT :workspace_id, :chat_id, :channel, CAST(:external_id AS text) WHERE {_WITHIN_QUOTA}
    ON CONFLICT DO NOTHING
    RETURNING {{columns}}
    """,
    Chat,
)
# When a removed chat is created again, the record of its last message is cleared.
_CHANGE = Statement(
    """
    UPDATE chats
       SET channel = :channel, external_id = CAST(:external_id AS text), updated_at = now(), removed_at = NULL,
           last_message_id = CASE WHEN removed_at IS NULL THEN last_message_id END,
           last_message_role = CASE WHEN removed_at IS NULL THEN last_message_role END,
           last_message_at = CASE WHEN removed_at IS NULL THEN last_message_at END,
           last_user_message_at = CASE WHEN removed_at IS NULL THEN last_user_message_at END
     WHERE workspace_id = :workspace_id AND id = :chat_id
    RETURNING {columns}
    """,
    Chat,
)


@Rule
def put_chat(workspace_id: UUID, chat_id: UUID, channel: Channel, external_id: str | None) -> Steps[tuple[Chat, bool]]:
    """Create or update the chat; return the chat and whether it is new. A removed chat is created again."""
    name: dict[str, Any] = {"workspace_id": workspace_id, "chat_id": chat_id}
    values = name | {"channel": channel.value, "external_id": external_id}
    # The lock prevents other transactions from removing the chat and from adding messages.
    locked: Sequence[Chat] = yield _LOCK_ANY(**name)
    if not locked:
        if created := (yield _INSERT(**values, within_quota=False)):
            return created[0], True
        locked = yield _LOCK_ANY(**name)
    if not locked:  # the INSERT does nothing if the workspace has a quota
        yield from quotas.take.steps(workspace_id, Kind.CHATS, 1)
        if created := (yield _INSERT(**values, within_quota=True)):
            return created[0], True
        locked = yield _LOCK_ANY(**name)
    new = locked[0].removed_at is not None
    if new:
        yield from quotas.take.steps(workspace_id, Kind.CHATS, 1)
    changed = yield _CHANGE(**values)
    return changed[0], new


_REMOVE = Statement("""
    UPDATE chats SET removed_at = now(), updated_at = now() WHERE workspace_id = :workspace_id AND id = :chat_id
""")


@Rule
def remove_chat(workspace_id: UUID, chat_id: UUID) -> Steps[list[UUID]]:
    """Remove the chat and cancel its pending follow-ups; return the follow-ups that were cancelled.

    Raises `ChatNotFoundError`.
    """
    yield from lock_chat.steps(workspace_id, chat_id)
    yield _REMOVE(workspace_id=workspace_id, chat_id=chat_id)
    return (yield from follow_ups.cancel_chat_if_not_begun.steps(workspace_id, chat_id, ReasonCode.CHAT_REMOVED))


_ENSURE = Statement(f"""
    INSERT INTO chats (workspace_id, id) SELECT :workspace_id, :chat_id WHERE {_WITHIN_QUOTA}
    ON CONFLICT (workspace_id, id) DO NOTHING
""")
# If the message is already recorded, this statement does not lock the chat.
_KNOWN_OR_LOCK = Statement("""
    SELECT now() AS now, m.id AS known_id, m.chat_id AS known_chat_id, m.role AS known_role,
           m.created_at AS known_created_at, chat.*
      FROM (SELECT) AS this
      LEFT JOIN chat_messages m ON m.workspace_id = :workspace_id AND m.id = :message_id
      LEFT JOIN LATERAL (
           SELECT id, removed_at, last_message_id, last_message_role, last_message_at, last_user_message_at
             FROM chats
            WHERE workspace_id = :workspace_id AND id = :chat_id AND m.id IS NULL
              FOR NO KEY UPDATE) AS chat ON true
""")
_RECORD = Statement("""
    INSERT INTO chat_messages (workspace_id, id, chat_id, role, created_at)
    VALUES (:workspace_id, :message_id, :chat_id, :role, :created_at)
    ON CONFLICT DO NOTHING
    RETURNING id
""")
_RECORD_AND_ADVANCE = Statement("""
    WITH recorded AS (
        INSERT INTO chat_messages (workspace_id, id, chat_id, role, created_at)
        VALUES (:workspace_id, :message_id, :chat_id, :role, :created_at)
        ON CONFLICT DO NOTHING
        RETURNING id
    )
    UPDATE chats
       SET last_message_id = CAST(:last_message_id AS uuid), last_message_role = CAST(:last_message_role AS text),
           last_message_at = CAST(:last_message_at AS timestamptz),
           last_user_message_at = CAST(:last_user_message_at AS timestamptz), updated_at = now()
      FROM recorded
     WHERE chats.workspace_id = :workspace_id AND chats.id = :chat_id
    RETURNING chats.id
""")
_SECOND = timedelta(seconds=1)


def counts_as(created_at: datetime) -> datetime:
    """Return a message's effective time: a time in whole seconds becomes the end of that second.

    Several channels report times in whole seconds. A reply in the same second as a follow-up's message must not seem
    older than that message.

    >>> counts_as(datetime(2030, 1, 31, 9, 0, 0)).time().isoformat()
    '09:00:00.999999'
    """
    return created_at if created_at.microsecond else created_at + _SECOND - datetime.resolution


@Rule
def receive(
    workspace_id: UUID, *, message_id: UUID, chat_id: UUID, role: Role, created_at: datetime | None
) -> Steps[RecordedMessage]:
    """Record a chat message; a user's or operator's message cancels the chat's pending follow-ups.

    If the chat is unknown, it is created. A message older than the chat's latest message is recorded but cancels
    nothing. A user's older message still opens the messaging window, which then starts at that message's time.
    Recording the same message again changes nothing. Raises `ChatNotFoundError` for a removed chat.
    """
    names: dict[str, Any] = {"workspace_id": workspace_id, "message_id": message_id, "chat_id": chat_id}
    (chat,) = yield _KNOWN_OR_LOCK(**names)
    if chat.known_id is None and chat.id is None:
        yield _ENSURE(workspace_id=workspace_id, chat_id=chat_id, within_quota=False)
        (chat,) = yield _KNOWN_OR_LOCK(**names)
    if chat.known_id is None and chat.id is None:  # the chat was not inserted, because its workspace has a quota
        yield from quotas.take.steps(workspace_id, Kind.CHATS, 1)
        yield _ENSURE(workspace_id=workspace_id, chat_id=chat_id, within_quota=True)
        (chat,) = yield _KNOWN_OR_LOCK(**names)
    if chat.known_id is not None:
        return _known(chat)
    if chat.removed_at is not None:
        raise ChatNotFoundError
    at = created_at or chat.now
    values = names | {"role": role.value, "created_at": at}
    is_last, advanced = _advance(chat, message_id, role, at)
    recorded = yield _RECORD_AND_ADVANCE(**values, **advanced) if advanced else _RECORD(**values)
    if not recorded:
        (known,) = yield _KNOWN_OR_LOCK(**names)
        return _known(known)
    cancelled: list[UUID] = []
    if is_last and (code := CANCELLING.get(role)):
        cancelled = yield from follow_ups.cancel_chat_if_not_begun.steps(workspace_id, chat_id, code)
    return RecordedMessage(message_id, chat_id, role, at, tuple(cancelled), new=True)


def _advance(chat: Any, message_id: UUID, role: Role, at: datetime) -> tuple[bool, dict[str, Any]]:  # noqa: ANN401 - a row
    """Return whether the message is the chat's latest, and the chat's changed values.

    A message's time may come from a host whose clock is fast. A message with a future time counts as written now. If a
    future time were stored, later replies would seem older and cancel nothing. The time of an agent's message is stored
    exactly. A reply within the same second counts as later than the agent's message.
    """
    counted = min(counts_as(at), chat.now)
    is_last = chat.last_message_at is None or chat.last_message_at <= counted
    if not is_last and role is not Role.USER:
        return False, {}
    values = {
        "last_message_id": message_id if is_last else chat.last_message_id,
        "last_message_role": role.value if is_last else chat.last_message_role,
        "last_message_at": chat.last_message_at,
        "last_user_message_at": chat.last_user_message_at,
    }
    if is_last:
        values["last_message_at"] = min(at, chat.now) if role is Role.AGENT else counted
    if role is Role.USER:
        values["last_user_message_at"] = max(min(at, chat.now), chat.last_user_message_at or min(at, chat.now))
    return is_last, values


def _known(row: Any) -> RecordedMessage:  # noqa: ANN401 - a row
    return RecordedMessage(row.known_id, row.known_chat_id, Role(row.known_role), row.known_created_at, (), new=False)
