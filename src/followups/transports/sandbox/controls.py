"""The sandbox's HTTP routes, which receive deliveries, set behaviours and list requests and conversations."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Literal

from aiohttp import web
from pydantic import Field, ValidationError
from standardwebhooks import WebhookVerificationError

from followups.transports.sandbox.behaviour import Behaviour, Incoming, Reply, WireModel
from followups.transports.sandbox.chats import ACCEPT, SandboxChats
from followups.transports.sandbox.ledger import Arrival

if TYPE_CHECKING:
    from followups.transports.signing import Signer

CHATS = web.AppKey("chats", SandboxChats)
VERIFIER: web.AppKey[Signer | None] = web.AppKey("verifier")

EVERY = 10**12
"""A limit greater than any possible number of requests."""

routes = web.RouteTableDef()


class RequestsQuery(WireModel):
    """Selects up to ``limit`` requests that follow request number ``after``, from one chat or all chats."""

    chat_id: str | None = None
    after: Annotated[int, Field(ge=0, le=EVERY)] = 0
    limit: Annotated[int, Field(ge=1, le=EVERY)] = EVERY


class NewMessage(WireModel):
    """A message that another participant writes into a chat."""

    role: Literal["user", "agent", "operator"] = "user"
    text: Annotated[str, Field(min_length=1, max_length=65_536)]


@routes.post("/messages")
async def deliver(request: web.Request) -> web.StreamResponse:
    """Receive a delivery: 200 with the id, 400 if invalid, 401 for a wrong signature."""
    received, chats = Arrival.now(), request.app[CHATS]
    body = await request.read()
    try:
        _verify(request, body)
        incoming = Incoming.model_validate_json(body)
    except (WebhookVerificationError, UnicodeDecodeError, ValueError) as error:
        chats.ledger.count_invalid()
        status = 401 if isinstance(error, WebhookVerificationError) else 400
        return _json({"error": _words(error)}, status)
    key = request.headers.get("idempotency-key") or incoming.follow_up_id
    return await _answer(request, chats.receive(incoming, key, received))


async def _answer(request: web.Request, reply: Reply) -> web.StreamResponse:
    if reply.delay:
        await asyncio.sleep(reply.delay)
    if reply.dropped and request.transport:
        request.transport.close()
    return web.Response(
        status=reply.status, body=reply.body.encode(), content_type="application/json", headers=reply.headers
    )


@routes.get("/sandbox/requests")
async def requests(request: web.Request) -> web.Response:
    """List the requests, oldest first; ``chatId``, ``after`` and ``limit`` select some of them."""
    try:
        wanted = RequestsQuery.model_validate(dict(request.query))
    except ValueError as error:
        return _json({"error": _words(error)}, 422)
    page = request.app[CHATS].ledger.page(wanted.after, wanted.limit)
    listed = [(number, one) for number, one in page if wanted.chat_id in {None, one.chat_id}]
    return _json([{"number": number, **one.document()} for number, one in listed])


@routes.get("/sandbox/summary")
async def summary(request: web.Request) -> web.Response:
    """Return the counts of requests and messages."""
    return _json(request.app[CHATS].ledger.summary())


@routes.get("/sandbox/chats")
async def conversations(request: web.Request) -> web.Response:
    """Return the conversations that the sandbox keeps."""
    return _json(list(request.app[CHATS].conversations()))


@routes.delete("/sandbox")
async def clear(request: web.Request) -> web.Response:
    """Delete the recorded requests and conversations."""
    request.app[CHATS].clear()
    return web.Response(status=204)


@routes.post("/sandbox/chats/{chat_id}/messages")
async def add_message(request: web.Request) -> web.Response:
    """Write a message into a chat as another participant; return 201 with the message."""
    try:
        said = NewMessage.model_validate_json(await request.read())
    except ValueError as error:
        return _json({"error": _words(error)}, 422)
    message = request.app[CHATS].add_message(request.match_info["chat_id"], said.role, said.text)
    return _json(message.document(), 201)


@routes.view("/sandbox/behaviour")
class DefaultBehaviour(web.View):
    """The behaviour of every chat for which no behaviour has been set."""

    async def get(self) -> web.Response:
        """Return the default behaviour."""
        return _behaviour(self.request.app[CHATS].default)

    async def put(self) -> web.Response:
        """Change the default behaviour; respond with 200, or with 422 if the behaviour is invalid."""
        try:
            behaviour = Behaviour.model_validate_json(await self.request.read())
        except ValueError as error:
            return _json({"error": _words(error)}, 422)
        self.request.app[CHATS].default = behaviour
        return _behaviour(behaviour)

    async def delete(self) -> web.Response:
        """Reset the default behaviour: every request is accepted again."""
        self.request.app[CHATS].default = ACCEPT
        return web.Response(status=204)


@routes.view("/sandbox/chats/{chat_id}/behaviour")
class ChatBehaviour(web.View):
    """The behaviour of one chat."""

    async def get(self) -> web.Response:
        """Return the behaviour that is set for the chat, or the default behaviour."""
        chats = self.request.app[CHATS]
        return _behaviour(chats.behaviour(self.request.match_info["chat_id"]) or chats.default)

    async def put(self) -> web.Response:
        """Change the chat's behaviour; return 200, or 422 if the behaviour is invalid."""
        try:
            behaviour = Behaviour.model_validate_json(await self.request.read())
        except ValueError as error:
            return _json({"error": _words(error)}, 422)
        self.request.app[CHATS].behave(self.request.match_info["chat_id"], behaviour)
        return _behaviour(behaviour)

    async def delete(self) -> web.Response:
        """Remove the chat's behaviour; the default applies again."""
        self.request.app[CHATS].reset(self.request.match_info["chat_id"])
        return web.Response(status=204)


def _verify(request: web.Request, body: bytes) -> None:
    verifier = request.app[VERIFIER]
    if verifier is not None:
        verifier.verify(body, dict(request.headers))


def _words(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    # The error omits the input, which may contain a message's text.
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in error.errors())


def _behaviour(behaviour: Behaviour) -> web.Response:
    return _json(behaviour.model_dump(mode="json", by_alias=True))


def _json(document: object, status: int = 200) -> web.Response:
    return web.json_response(document, status=status, dumps=json.dumps)
