"""Helpers for transport tests: settings, deliveries, a scripted server and a Matrix homeserver."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from aiohttp import ClientSession, web

from followups.settings import Settings, load_settings
from followups.transports.port import Delivery, Transport
from followups.transports.sandbox.behaviour import Incoming

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import trustme

    from followups.transports.sandbox.chats import SandboxChats

MESSAGE = "the text that nobody but the receiver may see"
TOKEN = "syt_token"  # noqa: S105 - used only by test servers
SIGNING_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105 - the example from the specification

BODY = {
    "followUpId": "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f",
    "workspaceId": "w1",
    "channel": "api",
    "chatId": "c1",
    "externalChatId": None,
    "triggerChatMessageId": "t1",
    "message": "<b>hello</b>",
    "dueDate": "2026-03-01T12:00:00Z",
    "attempt": 1,
}
"""The body of a delivery whose message contains markup."""


def open_files() -> int:
    """Return how many files and sockets this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def settings_for(url: str | None = None, **overrides: Any) -> Settings:
    """Return settings that deliver to ``url`` with a transport timeout of 5 s."""
    defaults: dict[str, Any] = {"transport_timeout": 5}
    return load_settings(
        database_url="postgresql://x/y", broker_url="redis://x", transport_url=url, **(defaults | overrides)
    )


def a_delivery(**changes: Any) -> Delivery:
    """Return a delivery for a follow-up that is due now, in a new chat with a Matrix room."""
    chat_id = uuid4()
    delivery = Delivery(
        follow_up_id=uuid4(),
        workspace_id=uuid4(),
        chat_id=chat_id,
        channel="api",
        external_chat_id=f"!{chat_id}:example.org",
        trigger_chat_message_id=uuid4(),
        message=MESSAGE,
        due_date=datetime.now(UTC),
        attempt=1,
    )
    return replace(delivery, **changes)


@asynccontextmanager
async def opened(transport: Transport) -> AsyncIterator[Transport]:
    """Open a transport and close it at the end."""
    await transport.open()
    try:
        yield transport
    finally:
        await transport.close()


@dataclass
class Request:
    """A request received by a `ScriptedServer`."""

    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class ScriptedServer:
    """An HTTP server that responds with the bytes given by a test."""

    answer: bytes | Callable[[asyncio.StreamWriter, Request], Awaitable[None]] = b""
    requests: list[Request] = field(default_factory=list)
    requested: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0
    url: str = ""
    writer: asyncio.StreamWriter = field(init=False)
    """The stream writer of the last connection."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writer = writer
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):  # the client closed the connection
            while not writer.is_closing():
                request = await _request(reader)
                self.requests.append(request)
                self.requested.set()
                if callable(self.answer):
                    await self.answer(writer, request)
                    return
                writer.write(self.answer)
                await writer.drain()


async def _request(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(head[0].split(" ")[1], headers, body)


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    secure: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[str]:
    """Serve connections on a free port, over TLS if there is a certificate, and yield the URL."""
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            # asyncio cannot abort a TLS transport that was closed twice.
            if not writer.is_closing():
                writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        tasks.add(asyncio.create_task(served(reader, writer)))

    server = await asyncio.start_server(connected, host, 0, ssl=secure)
    name = f"[{host}]" if ":" in host else host
    try:
        yield f"http{'s' if secure else ''}://{name}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
        # the event loop needs several iterations to read the end of every connection
        await asyncio.sleep(0.05 if secure else 0)


@asynccontextmanager
async def scripted(
    answer: bytes | Callable[[asyncio.StreamWriter, Request], Awaitable[None]],
    secure: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[ScriptedServer]:
    """Run a `ScriptedServer` on a free port, over TLS if a certificate is given."""
    scripted_server = ScriptedServer(answer)
    async with listening(scripted_server.serve, secure, host) as scripted_server.url:
        yield scripted_server


def certified(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    """Return a server's TLS context with a certificate for the given name."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


async def stay_silent(_writer: asyncio.StreamWriter, _request: Request) -> None:
    """Keep the connection open without ever responding."""
    await asyncio.sleep(60)


def answer(status: int | str, body: bytes = b"", **headers: str) -> bytes:
    """Return an HTTP response as bytes; keyword arguments become headers."""
    lines = [f"HTTP/1.1 {status} Whatever", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def homeserver(chats: SandboxChats) -> web.Application:
    """Return a Matrix homeserver backed by ``chats``, with only the endpoints that sending needs."""

    async def put(request: web.Request) -> web.StreamResponse:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return web.json_response({"errcode": "M_UNKNOWN_TOKEN"}, status=401)
        content = await request.json()
        if content["msgtype"] != "m.text":
            return web.json_response({"errcode": "M_BAD_JSON"}, status=400)
        incoming = Incoming(
            follow_up_id=request.match_info["transaction"],
            chat_id=request.match_info["room"].removeprefix("!").partition(":")[0],
            message=content["body"],
            due_date=datetime.now(UTC),
            attempt=1,
        )
        reply = chats.receive(incoming, incoming.follow_up_id)
        await asyncio.sleep(reply.delay)
        if reply.dropped and request.transport:
            request.transport.close()
        return web.Response(status=reply.status, body=_matrix_body(reply.body), headers=reply.headers)

    app = web.Application()
    app.router.add_put("/_matrix/client/v3/rooms/{room}/send/m.room.message/{transaction}", put)
    return app


def _matrix_body(body: str) -> bytes:
    """Convert the sandbox's response to Matrix's format, unless a test prescribed the response."""
    try:
        message_id = UUID(json.loads(body)["chatMessageId"])
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return body.encode()
    return json.dumps({"event_id": f"${message_id}"}).encode()


async def fetch(http: ClientSession, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Return the status and the JSON body (None if there is no body)."""
    async with http.request(method, path, json=body) as response:
        text = await response.text()
        return response.status, json.loads(text) if text else None
