"""What the platform reports about chats: that they exist, who wrote in them, that they were removed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import Response

from followups.api import json_responses, response_docs
from followups.api.authentication import Authenticated, AuthenticatedRoute
from followups.api.fields import Id  # noqa: TC001 - FastAPI reads the annotations
from followups.api.schemas import Chat, ChatMessage, ChatPut, NewChatMessage
from followups.states import ReasonCode
from followups.store import chats

router = APIRouter(prefix="/api/v1", tags=["Chats"], route_class=AuthenticatedRoute)


@router.put("/chats/{chatId}", operation_id="putChat", response_model=Chat, responses=response_docs.PUT_CHAT)
def put_chat(chat_id: Annotated[Id, Path(alias="chatId")], body: ChatPut, caller: Authenticated) -> Response:
    """Create or update a chat. One that was removed starts anew."""
    with caller.transaction() as work:
        if caller.exclusive_external_ids and body.external_id is not None:
            chats.take_external_id(work.session, work.workspace_id, body.external_id)
        chat, new = chats.put_chat(work.session, work.workspace_id, chat_id, body.channel, body.external_id)
    return json_responses.answer(json_responses.one(Chat, chat), 201 if new else 200)


@router.delete("/chats/{chatId}", operation_id="removeChat", status_code=204, responses=response_docs.REMOVE_CHAT)
def remove_chat(chat_id: Annotated[Id, Path(alias="chatId")], caller: Authenticated) -> Response:
    """Remove a chat; its pending follow-ups become cancelled."""
    with caller.transaction() as work:
        cancelled = chats.remove_chat(work.session, work.workspace_id, chat_id)
        work.cancelled(cancelled, ReasonCode.CHAT_REMOVED)
    return Response(status_code=204)


@router.post(
    "/chat-messages",
    operation_id="receiveChatMessage",
    status_code=201,
    response_model=ChatMessage,
    responses=response_docs.RECEIVE,
)
def receive_chat_message(body: NewChatMessage, caller: Authenticated) -> Response:
    """Record that somebody wrote in a chat; a user's or an operator's message cancels its pending follow-ups."""
    with caller.transaction() as work:
        received = chats.receive(
            work.session,
            work.workspace_id,
            message_id=body.id,
            chat_id=body.chat_id,
            role=body.role,
            created_at=body.created_at,
        )
        if received.cancelled:
            work.cancelled(received.cancelled, chats.CANCELLING[body.role])
    message = asdict(received) | {"cancelled_follow_up_ids": received.cancelled}
    return json_responses.answer(json_responses.one(ChatMessage, message), 201 if received.new else 200)
