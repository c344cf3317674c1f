"""The sandbox over HTTP: an endpoint for the transport ``http``, controls, and a live page.

============================================= ==================================================================
``POST /messages``                            a delivery (deploy/ENDPOINT.md)
``GET /``                                     the live page
``GET /sandbox/requests``                     every kept request, oldest first; ``?after=&limit=`` a page
``GET /sandbox/summary``                      counts, and the lag of accepted messages
``GET /sandbox/chats``                        the conversations, latest activity first
``GET /sandbox/events``                       the same, live (Server-Sent Events)
``GET, PUT, DELETE /sandbox/behaviour``       the behaviour of every chat that has none of its own
``... /sandbox/chats/{chatId}/behaviour``     the behaviour of one chat
``POST /sandbox/chats/{chatId}/messages``     another participant writes: ``{"role": "user", "text": "..."}``
``DELETE /sandbox``                           forget requests and conversations; behaviours stay
============================================= ==================================================================

``python -m followups.transports.sandbox.server --port 8080`` runs the sandbox. The sandbox is not meant for production,
because its controls require no API key.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import time
from contextlib import asynccontextmanager
from functools import lru_cache
from importlib.resources import files
from itertools import islice
from typing import TYPE_CHECKING

from aiohttp import web

from followups.errors import FollowUpsError
from followups.transports.sandbox import controls
from followups.transports.sandbox.chats import SandboxChats
from followups.transports.sandbox.controls import CHATS, VERIFIER
from followups.transports.sandbox.ledger import KEEP_RECORDS
from followups.transports.signing import Signer
from followups.waits import wait

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


CLOSING = web.AppKey("closing", asyncio.Event)

INTERVAL = 0.2
"""Seconds between two checks for changes."""
SHARE = 0.05
"""Share of one core that an open page may use; under load the page is updated less often."""
HEARTBEAT = 10.0
"""If nothing changes for this many seconds, a comment is sent to detect a lost connection."""
CHATS_SHOWN = 40
"""Number of chats that the page shows."""
LATEST_LAGS = 1_000
"""Number of accepted messages that the page's summary of lags covers."""

routes = web.RouteTableDef()


@routes.get("/")
async def page(_request: web.Request) -> web.Response:
    """Serve the sandbox's live page."""
    text, policy = _page()
    return web.Response(text=text, content_type="text/html", headers={"content-security-policy": policy})


@routes.get("/sandbox/events")
async def events(request: web.Request) -> web.StreamResponse:
    """Stream the changes of the sandbox.

    The first event contains the complete state, as does the event after ``DELETE /sandbox``.
    """
    chats, closing = request.app[CHATS], request.app[CLOSING]
    response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-store"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionResetError):  # raised when the viewer has closed the page
        await _stream(response, chats, closing)
    return response


async def end_streams(app: web.Application) -> None:
    """End every event stream, so that the server can stop."""
    app[CLOSING].set()


async def _stream(response: web.StreamResponse, chats: SandboxChats, closing: asyncio.Event) -> None:
    seen, cleared, last_sent, pause = -1, None, time.monotonic(), INTERVAL
    while not closing.is_set():
        started = time.monotonic()
        if (chats.changes, chats.cleared) != (seen, cleared):
            event = "update" if cleared == chats.cleared else "snapshot"
            data = _state(chats, since=seen if event == "update" else 0)
            seen, cleared = chats.changes, chats.cleared
            pause = max(INTERVAL, (time.monotonic() - started) / SHARE)
            await response.write(f"event: {event}\ndata: {data}\n\n".encode())
            last_sent = started
        elif started - last_sent > HEARTBEAT:
            await response.write(b": still here\n\n")
            last_sent = started
        await wait(closing, pause)


def _state(chats: SandboxChats, since: int) -> str:
    return json.dumps(
        {
            "summary": chats.ledger.summary(LATEST_LAGS),
            "default": chats.default.model_dump(mode="json", by_alias=True),
            "chats": list(islice(chats.conversations(since), CHATS_SHOWN)),
        }
    )


@lru_cache(maxsize=1)
def _page() -> tuple[str, str]:
    """Return the page and its Content-Security-Policy, which allows only the page's own script and style."""
    text = files(__package__).joinpath("page.html").read_text("utf-8")
    script, style = (_hash(text, tag) for tag in ("script", "style"))
    policy = f"default-src 'none'; connect-src 'self'; img-src data:; script-src {script}; style-src {style}"
    return text, f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _hash(text: str, tag: str) -> str:
    content = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = hashlib.sha256(content.group(1).encode() if content else b"").digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


BACKLOG = 1024
"""Number of connections that may wait to be accepted. In a burst, a worker may open a connection for each of its slots.
"""


def build_app(chats: SandboxChats | None = None, *, secret: str | None = None) -> web.Application:
    """Return the sandbox's web application; by default, its chats are new and discard duplicate messages.

    If ``secret`` is given (Standard Webhooks), deliveries must be signed. Raises `TransportConfigurationError` for an
    invalid secret.
    """
    app = web.Application()
    app[CHATS] = chats or SandboxChats()
    app[VERIFIER] = Signer(secret) if secret else None
    app.add_routes(controls.routes)
    app.add_routes(routes)
    app[CLOSING] = asyncio.Event()
    app.on_shutdown.append(end_streams)
    return app


@asynccontextmanager
async def serving(app: web.Application, *, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve ``app`` and yield its base URL; port 0 selects a free port.

    Raises `OSError` if the port is in use.
    """
    # If the client closes the connection, the sandbox abandons its slow response.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.25)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
        taken = runner.addresses[0][1]
        yield f"http://{f'[{host}]' if ':' in host else host}:{taken}"
    finally:
        await runner.cleanup()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sandbox until SIGTERM or SIGINT. The exit code is 0, 1 or 2.

    Once the server is ready, the command prints one line with the server's address to stdout.
    """
    options = _parser().parse_args(arguments)
    try:
        asyncio.run(_run(options))
    except (OSError, FollowUpsError) as error:
        sys.stderr.write(f"The sandbox cannot start: {error}\n")
        return 1
    return 0


async def _run(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    chats = SandboxChats(deduplicates=options.dedup, keep=options.keep)
    async with serving(build_app(chats, secret=options.secret), host=options.host, port=options.port) as url:
        sys.stdout.write(f"The sandbox chat is ready at {url}/ and receives messages at {url}/messages\n")
        sys.stdout.flush()
        await stop.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m followups.transports.sandbox.server", description="A chat server for testing deliveries."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument(
        "--secret",
        default=os.environ.get("FOLLOWUPS_TRANSPORT_SECRET") or None,
        help="secret with which deliveries must be signed (default: FOLLOWUPS_TRANSPORT_SECRET)",
    )
    parser.add_argument(
        "--no-dedup", dest="dedup", action="store_false", help="treat a repeated idempotency-key as a new message"
    )
    parser.add_argument(
        "--keep", type=int, default=KEEP_RECORDS, help="number of requests to keep (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
