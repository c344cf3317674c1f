"""One chat's page: who wrote in it and when, and its past and pending follow-ups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select, text

from followups.channels import window_closes_at
from followups.console import reasons
from followups.console.pages.follow_ups import LIMIT
from followups.console.visit import uuid_or_none
from followups.errors import ChatNotFoundError
from followups.models import Chat, ChatMessage, Workspace
from followups.states import Status
from followups.store import browse, bulk_cancel
from followups.store.browse import BrowseFilter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session
    from starlette.responses import Response

    from followups.console.visit import Visit

MESSAGES = 50
"""Maximum number of messages shown. In a long chat, only the most recent messages are shown."""

FOLLOW_UPS = 25
"""The page shows at most this many pending and this many past follow-ups."""

NOW = text("SELECT now()")


def show(visit: Visit) -> Response:
    """Show the page of a chat."""
    with visit.transaction() as session:
        chat = _own(visit, session)
        now = session.execute(NOW).scalar_one()
        messages = session.scalars(
            select(ChatMessage)
            .where(ChatMessage.workspace_id == chat.workspace_id, ChatMessage.chat_id == chat.id)
            .order_by(ChatMessage.created_at.desc())
            .limit(MESSAGES)
        ).all()
        coming = _rows(session, chat, (Status.PENDING,))
        past = _rows(session, chat, (Status.SENT, Status.FAILED, Status.CANCELLED))
        sentences = reasons.of_rows(visit.services, session, [*coming, *past], now)
        workspace = session.get_one(Workspace, chat.workspace_id).name
        session.expunge_all()
    return visit.page(
        "chat.html",
        chat=chat,
        workspace=workspace,
        messages=messages,
        coming=coming,
        past=past,
        sentences=sentences,
        window_closes_at=window_closes_at(chat.channel, chat.last_user_message_at),
        now=now,
        most={"messages": MESSAGES, "follow_ups": FOLLOW_UPS},
    )


def _own(visit: Visit, session: Session) -> Chat:
    """Return the chat whose id is in the path.

    Raises `ChatNotFoundError` if the person may not see the chat.
    """
    viewer, chat_id = visit.person, visit.id()
    workspace_id = viewer.workspace_id or uuid_or_none(visit.query.text("workspace"))
    if workspace_id is None:
        # Several workspaces may have a chat with this id, but usually only one workspace does.
        workspace_id = next(iter(bulk_cancel.workspaces_of_chat(session.connection(), chat_id)), None)
    chat = session.get(Chat, (workspace_id, chat_id)) if workspace_id else None
    if chat is None or not viewer.sees(chat.workspace_id, chat.id):
        raise ChatNotFoundError
    return chat


def _rows(session: Session, chat: Chat, statuses: Sequence[Status]) -> list[browse.Row]:
    wanted = BrowseFilter(workspace_id=chat.workspace_id, chat_id=chat.id, statuses=tuple(statuses))
    found = browse.search(session.connection(), wanted, None, FOLLOW_UPS, LIMIT)
    return found.rows if found else []
