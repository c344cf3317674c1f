"""Endpoints with which the platform reports chats, their messages, and their removal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from followups.api import responses
from followups.api.authentication import AuthenticatedRoute, Caller, Work
from followups.api.fields import Id  # noqa: TC001 - FastAPI reads the annotations
from followups.api.schemas import Chat, ChatMessage, ChatPut, NewChatMessage
from followups.states import ReasonCode
from followups.store import audit, chats, external_ids
from followups.store.audit import Action, Actor, Event, Way

if TYPE_CHECKING:
    from uuid import UUID

    from followups.statements import Steps

router = APIRouter(prefix="/api/v1", tags=["Chats"], route_class=AuthenticatedRoute)


@router.put("/chats/{chatId}", operation_id="putChat", response_model=Chat, responses=responses.PUT_CHAT)
async def put_chat(chat_id: Annotated[Id, Path(alias="chatId")], body: ChatPut, request: Request) -> Response:
    """Create or update a chat. A PUT for a removed chat creates a new chat."""
    caller = Caller(request)
    exclusive = caller.exclusive_external_ids
    chat, new = await caller.change(lambda work: _put(work.workspace_id, chat_id, body, exclusive=exclusive))
    return responses.answer(responses.one(Chat, chat), 201 if new else 200)


def _put(workspace_id: UUID, chat_id: UUID, body: ChatPut, *, exclusive: bool) -> Steps[tuple[object, bool]]:
    if exclusive and body.external_id is not None:
        yield from external_ids.take.steps(workspace_id, body.external_id)
    return (yield from chats.put_chat.steps(workspace_id, chat_id, body.channel, body.external_id))


@router.delete("/chats/{chatId}", operation_id="removeChat", status_code=204, responses=responses.REMOVE_CHAT)
async def remove_chat(chat_id: Annotated[Id, Path(alias="chatId")], request: Request) -> Response:
    """Remove a chat and cancel its pending follow-ups."""
    await Caller(request).change(lambda work: _remove(work, chat_id))
    return Response(status_code=204)


def _remove(work: Work, chat_id: UUID) -> Steps[None]:
    cancelled = yield from chats.remove_chat.steps(work.workspace_id, chat_id)
    work.cancelled(cancelled, ReasonCode.CHAT_REMOVED)
    if cancelled:
        actor = Actor(Way.API, work.key_id)
        event = Event(actor, Action.CHAT_REMOVED, work.workspace_id, chat_id, number=len(cancelled))
        yield from audit.record.steps(event)


@router.post(
    "/chat-messages",
    operation_id="receiveChatMessage",
    status_code=201,
    response_model=ChatMessage,
    responses=responses.RECEIVE,
)
async def receive_chat_message(body: NewChatMessage, request: Request) -> Response:
    """Record a chat message; a message from the user or an operator cancels the chat's pending follow-ups."""
    received = await Caller(request).change(lambda work: _receive(work, body))
    return responses.answer(responses.one(ChatMessage, received), 201 if received.new else 200)


def _receive(work: Work, body: NewChatMessage) -> Steps[chats.RecordedMessage]:
    received = yield from chats.receive.steps(
        work.workspace_id, message_id=body.id, chat_id=body.chat_id, role=body.role, created_at=body.created_at
    )
    if received.cancelled:
        work.cancelled(received.cancelled, chats.CANCELLING[body.role])
    return received
