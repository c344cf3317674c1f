"""Links into the console, for platforms that show follow-ups to their people."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response  # noqa: TC002 - FastAPI reads the annotations

from followups.api import json_responses, response_docs
from followups.api.authentication import Authenticated, AuthenticatedRoute
from followups.api.schemas import ConsoleLink, NewConsoleLink
from followups.errors import ChatNotFoundError, ConsoleOffError
from followups.models import ApiKey, Chat
from followups.store import audit, console_sessions
from followups.store.audit import Action, Actor, Event, Way
from followups.store.console_sessions import Grant

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

HOST = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", re.ASCII)

router = APIRouter(prefix="/api/v1", tags=["Console"], route_class=AuthenticatedRoute)


@router.post(
    "/console-links",
    operation_id="createConsoleLink",
    status_code=201,
    response_model=ConsoleLink,
    responses=response_docs.LINK,
)
def create_console_link(body: NewConsoleLink, caller: Authenticated, request: Request) -> Response:
    """Make a link that signs a person in to the console once, as viewer or agent of the workspace."""
    with caller.transaction() as work:
        if not hasattr(request.app.state, "console"):
            raise ConsoleOffError
        if body.chat_id is not None:
            _require_chat(work.session, work.workspace_id, body.chat_id)
        grant = Grant(body.role, work.workspace_id, _named(work.session, caller.key_id), body.chat_id, caller.key_id)
        token, expires_at = console_sessions.make_link(work.session, grant, body.expires_in)
        details = {"role": body.role, "chatId": body.chat_id}
        event = Event(Actor(Way.API, caller.key_id), Action.CONSOLE_LINK_CREATED, work.workspace_id, details=details)
        audit.record(work.session.connection(), event)
    link: dict[str, Any] = {"url": f"{_address(request)}/console/login#token={token}", "expires_at": expires_at}
    return json_responses.answer(json_responses.one(ConsoleLink, link), 201)


def _require_chat(session: Session, workspace_id: UUID, chat_id: UUID) -> None:
    chat = session.get(Chat, (workspace_id, chat_id))
    if chat is None or chat.removed_at is not None:
        raise ChatNotFoundError


def _named(session: Session, key_id: UUID) -> str:
    key = session.get_one(ApiKey, key_id)
    return key.name or f"{key.prefix}…"


def _address(request: Request) -> str:
    """Return where people reach the console: FOLLOWUPS_PUBLIC_URL, or else where this request arrived."""
    public: str | None = request.app.state.console.services.settings.public_url
    if public is not None:
        return public
    host = request.headers.get("host", "")
    return f"{request.url.scheme}://{host}" if HOST.fullmatch(host) else ""
