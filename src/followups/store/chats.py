"""Chats and chat messages. The row lock on the chat separates a reply from a new follow-up."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.dialects.postgresql import insert

from followups.errors import ChatNotFoundError, ExternalChatTakenError
from followups.models import Chat, ChatMessage, FollowUp
from followups.states import ReasonCode
from followups.store import follow_ups

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.channels import Channel


class Role(StrEnum):
    """The author of a chat message."""

    USER = "user"
    AGENT = "agent"
    OPERATOR = "operator"


CANCELLING = {Role.USER: ReasonCode.USER_REPLIED, Role.OPERATOR: ReasonCode.HUMAN_TAKEOVER}
"""The roles whose messages cancel the chat's pending follow-ups, each with its reason."""


@dataclass(frozen=True, slots=True)
class Received:
    """A chat message as recorded. ``new`` is False if it was known already; then nothing changed."""

    id: UUID
    chat_id: UUID
    role: Role
    created_at: datetime
    cancelled: tuple[UUID, ...]
    new: bool


# Built once: building a statement costs more than running it.
_LOCK = (
    select(Chat)
    .where(Chat.workspace_id == bindparam("workspace_id"), Chat.id == bindparam("chat_id"), Chat.removed_at.is_(None))
    .with_for_update(key_share=True)
    .execution_options(populate_existing=True)
)


def lock_chat(session: Session, workspace_id: UUID, chat_id: UUID) -> Chat:
    """Return the chat, locked until the transaction ends. Raises `ChatNotFoundError`, also for a removed chat."""
    chat = session.scalar(_LOCK, {"workspace_id": workspace_id, "chat_id": chat_id})
    if chat is None:
        raise ChatNotFoundError
    return chat


_LOCK_OF = (
    select(Chat)
    .join(FollowUp, FollowUp.workspace_id == Chat.workspace_id)
    .where(FollowUp.id == bindparam("follow_up_id"), Chat.id.in_([FollowUp.chat_id, bindparam("target")]))
    .order_by(Chat.id)
    .with_for_update(key_share=True, of=Chat)
    .execution_options(populate_existing=True)
)
_LOCK_OF_MINE = _LOCK_OF.where(FollowUp.workspace_id == bindparam("workspace_id"))


def lock_chats_of(
    session: Session, follow_up_id: UUID, workspace_id: UUID | None, target: UUID | None
) -> dict[UUID, Chat]:
    """Lock and return the follow-up's chat and the ``target`` chat, including removed chats.

    The chats stay locked until the transaction ends. A chat that does not exist is left out. A ``workspace_id`` of None
    gives an operator's view of all workspaces.
    """
    query = _LOCK_OF if workspace_id is None else _LOCK_OF_MINE
    parameters = {"follow_up_id": follow_up_id, "workspace_id": workspace_id, "target": target}
    return {chat.id: chat for chat in session.scalars(query, parameters)}


_ANEW: dict[str, object] = {
    "removed_at": None,
    "last_message_id": None,
    "last_message_role": None,
    "last_message_at": None,
    "last_user_message_at": None,
}
"""What a removed chat forgets when it comes back."""


# Two transactions that take the same external id at once run one after the other; the second sees what the first has
# committed.
_LOCK_EXTERNAL_ID = text("SELECT pg_advisory_xact_lock(hashtextextended(:external_id, 0))")
_TAKEN = text("""
    SELECT EXISTS (SELECT FROM chats
                    WHERE external_id = :external_id AND workspace_id <> :workspace_id AND removed_at IS NULL)
""")


def take_external_id(session: Session, workspace_id: UUID, external_id: str) -> None:
    """Reserve an external id for the workspace until the transaction ends.

    By then one of the workspace's chats has the id. Raises `ExternalChatTakenError` if a chat of another workspace has
    it; a removed chat has no external id.
    """
    parameters = {"workspace_id": workspace_id, "external_id": external_id}
    session.execute(_LOCK_EXTERNAL_ID, parameters)
    if session.execute(_TAKEN, parameters).scalar_one():
        raise ExternalChatTakenError


def put_chat(
    session: Session, workspace_id: UUID, chat_id: UUID, channel: Channel, external_id: str | None
) -> tuple[Chat, bool]:
    """Create or update the chat; return it and whether it is new. A removed one starts anew."""
    values: dict[str, object] = {"channel": channel.value, "external_id": external_id}
    statement = insert(Chat).values(workspace_id=workspace_id, id=chat_id, **values)
    created = session.scalar(statement.on_conflict_do_nothing().returning(Chat))
    if created is not None:
        return created, True
    # Only under the lock is it certain whether the chat was removed, and what was written in it.
    this = (Chat.workspace_id == workspace_id, Chat.id == chat_id)
    removed = session.execute(select(Chat.removed_at).where(*this).with_for_update(key_share=True)).scalar_one()
    if removed is not None:
        values |= _ANEW
    change = update(Chat).where(*this).values(**values, updated_at=func.now()).returning(Chat)
    options = {"populate_existing": True, "synchronize_session": False}
    return session.scalars(change, execution_options=options).one(), removed is not None


def remove_chat(session: Session, workspace_id: UUID, chat_id: UUID) -> list[UUID]:
    """Remove the chat and cancel its pending follow-ups; return the cancelled ones. Raises `ChatNotFoundError`."""
    lock_chat(session, workspace_id, chat_id)
    session.execute(
        update(Chat)
        .where(Chat.workspace_id == workspace_id, Chat.id == chat_id)
        .values(removed_at=func.now(), updated_at=func.now())
    )
    return follow_ups.cancel_chat_if_not_begun(session, workspace_id, chat_id, ReasonCode.CHAT_REMOVED)


_ENSURE = text("""
    INSERT INTO chats (workspace_id, id) VALUES (:workspace_id, :chat_id)
    ON CONFLICT (workspace_id, id) DO NOTHING
""")

# The clock of the host that wrote the message may run ahead. A time in the future counts as now; otherwise every later
# reply would look older and cancel nothing. An agent's message keeps its own time, so that a reply in the same second
# with a more exact time is later.
_ADVANCE = text("""
    UPDATE chats
       SET last_message_id = :id, last_message_role = :role,
           last_message_at = LEAST(CASE WHEN :role = 'agent' THEN :at ELSE CAST(:counts_as AS timestamptz) END, now()),
           updated_at = now()
     WHERE workspace_id = :workspace_id AND id = :chat_id
       AND (last_message_at IS NULL OR last_message_at <= LEAST(CAST(:counts_as AS timestamptz), now()))
""")
_OPEN_WINDOW = text("""
    UPDATE chats SET last_user_message_at = GREATEST(last_user_message_at, LEAST(:at, now())), updated_at = now()
     WHERE workspace_id = :workspace_id AND id = :chat_id
""")
_SECOND = timedelta(seconds=1)


def counts_as(created_at: datetime) -> datetime:
    """Return when a message counts as written: a time in whole seconds counts as the end of its second.

    Several channels send times in whole seconds, and a reply within the second of our own message must not look older
    than that message.

    >>> counts_as(datetime(2030, 1, 31, 9, 0, 0)).time().isoformat()
    '09:00:00.999999'
    """
    return created_at if created_at.microsecond else created_at + _SECOND - datetime.resolution


def receive(
    session: Session, workspace_id: UUID, *, message_id: UUID, chat_id: UUID, role: Role, created_at: datetime | None
) -> Received:
    """Record a chat message; a message of a user or an operator cancels the chat's pending follow-ups.

    An unknown chat is created. A message that is older than the chat's last one is recorded and cancels nothing, but a
    user's message still opens the messaging window by its own time. A message that is already known changes nothing at
    all. Raises `ChatNotFoundError` for a removed chat.
    """
    if known := session.get(ChatMessage, (workspace_id, message_id)):
        return _known(known)
    session.execute(_ENSURE, {"workspace_id": workspace_id, "chat_id": chat_id})
    lock_chat(session, workspace_id, chat_id)
    values: dict[str, object] = {"workspace_id": workspace_id, "id": message_id, "chat_id": chat_id, "role": role.value}
    if created_at is not None:
        values["created_at"] = created_at
    recorded = session.scalar(insert(ChatMessage).values(values).on_conflict_do_nothing().returning(ChatMessage))
    if recorded is None:
        return _known(session.get_one(ChatMessage, (workspace_id, message_id)))
    advance = {
        "workspace_id": workspace_id,
        "chat_id": chat_id,
        "id": message_id,
        "role": role.value,
        "at": recorded.created_at,
        "counts_as": counts_as(recorded.created_at),
    }
    is_last = session.execute(_ADVANCE, advance).rowcount == 1  # type: ignore[attr-defined]
    if role is Role.USER:
        session.execute(_OPEN_WINDOW, advance)
    cancelled: list[UUID] = []
    if is_last and (code := CANCELLING.get(role)):
        cancelled = follow_ups.cancel_chat_if_not_begun(session, workspace_id, chat_id, code)
    return Received(recorded.id, chat_id, role, recorded.created_at, tuple(cancelled), new=True)


def _known(message: ChatMessage) -> Received:
    return Received(message.id, message.chat_id, Role(message.role), message.created_at, (), new=False)
