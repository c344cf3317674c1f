"""Sign-in links to the console, for platforms that show follow-ups to their users."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response  # noqa: TC002 - FastAPI reads the annotations

from followups.api import responses
from followups.api.authentication import AuthenticatedRoute, Caller
from followups.api.schemas import ConsoleLink, NewConsoleLink
from followups.errors import ChatNotFoundError, ConsoleOffError
from followups.statements import Statement
from followups.store import audit, console_sessions
from followups.store.audit import Action, Actor, Event, Way
from followups.store.console_sessions import Grant

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from followups.statements import Steps

HOST = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", re.ASCII)

router = APIRouter(prefix="/api/v1", tags=["Console"], route_class=AuthenticatedRoute)


@router.post(
    "/console-links",
    operation_id="createConsoleLink",
    status_code=201,
    response_model=ConsoleLink,
    responses=responses.LINK,
)
async def create_console_link(body: NewConsoleLink, request: Request) -> Response:
    """Create a link that signs a person in to the console once, as viewer or agent of the workspace."""
    if not hasattr(request.app.state, "console"):
        raise ConsoleOffError
    caller = Caller(request)
    token, expires_at = await caller.change(lambda work: _make(work.workspace_id, caller.key_id, body))
    link: dict[str, Any] = {"url": f"{_address(request)}/console/login#token={token}", "expires_at": expires_at}
    return responses.answer(responses.one(ConsoleLink, SimpleNamespace(**link)), 201)


_NAME = Statement("SELECT COALESCE(NULLIF(name, ''), prefix || '…') AS name FROM api_keys WHERE id = :id")

_CHAT = Statement("SELECT id FROM chats WHERE workspace_id = :workspace_id AND id = :chat_id AND removed_at IS NULL")


def _make(workspace_id: UUID, key_id: UUID, body: NewConsoleLink) -> Steps[tuple[str, datetime]]:
    (key,) = yield _NAME(id=key_id)
    if body.chat_id is not None and not (yield _CHAT(workspace_id=workspace_id, chat_id=body.chat_id)):
        raise ChatNotFoundError
    grant = Grant(body.role, workspace_id, key.name, body.chat_id, key_id)
    token, expires_at = yield from console_sessions.make_link.steps(grant, body.expires_in)
    details = {"role": body.role, "chatId": body.chat_id}
    event = Event(Actor(Way.API, key_id), Action.CONSOLE_LINK_CREATED, workspace_id, details=details)
    yield from audit.record.steps(event)
    return token, expires_at


def _address(request: Request) -> str:
    """Return the console's URL: FOLLOWUPS_PUBLIC_URL, or the base URL of this request."""
    public: str | None = request.app.state.console.services.settings.public_url
    if public is not None:
        return public
    host = request.headers.get("host", "")
    return f"{request.url.scheme}://{host}" if HOST.fullmatch(host) else ""
