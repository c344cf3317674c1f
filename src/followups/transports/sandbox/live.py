"""The sandbox's page, and its stream of Server-Sent Events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import time
from functools import lru_cache
from importlib.resources import files
from itertools import islice
from typing import TYPE_CHECKING

from aiohttp import web

from followups.transports.sandbox.controls import CHATS

if TYPE_CHECKING:
    from followups.transports.sandbox.chats import SandboxChats

CLOSING = web.AppKey("closing", asyncio.Event)

INTERVAL = 0.2
"""Seconds between two checks for changes."""
SHARE = 0.05
"""Share of one core that an open page may use; under load the page is updated less often."""
HEARTBEAT = 10.0
"""Seconds without a change after which a comment is sent to the page, so that a lost connection is noticed."""
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

    The stream's first event, and the event after ``DELETE /sandbox``, contain the complete state.
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
        try:
            await asyncio.wait_for(closing.wait(), pause)
        except TimeoutError:
            continue


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
