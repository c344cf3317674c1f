"""The sandbox over HTTP: an endpoint for the transport ``http``, its controls, and a live page.

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

``python -m followups.transports.sandbox.server --port 8080`` runs the sandbox. It is not meant for production, because
its controls require no API key.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiohttp import web

from followups.errors import FollowUpsError
from followups.transports.sandbox import controls, live
from followups.transports.sandbox.chats import SandboxChats
from followups.transports.sandbox.controls import CHATS, VERIFIER
from followups.transports.sandbox.ledger import KEEP_RECORDS
from followups.transports.signing import Signer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

BACKLOG = 1024
"""Number of connections that may wait to be accepted. A burst may open a connection for each slot of the dispatcher."""


def build_app(chats: SandboxChats | None = None, *, secret: str | None = None) -> web.Application:
    """Return the web application for ``chats``; the default is new chats that deduplicate messages.

    If ``secret`` is given (Standard Webhooks), a delivery must be signed. Raises `TransportConfigurationError` for an
    invalid secret.
    """
    app = web.Application()
    app[CHATS] = chats or SandboxChats()
    app[VERIFIER] = Signer(secret) if secret else None
    app.add_routes(controls.routes)
    app.add_routes(live.routes)
    app[live.CLOSING] = asyncio.Event()
    app.on_shutdown.append(live.end_streams)
    return app


@asynccontextmanager
async def serving(app: web.Application, *, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve ``app`` and yield its base URL; port 0 selects a free port.

    Raises `OSError` if the port is in use.
    """
    # When the client gives up and closes the connection, a slow answer ends too.
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

    Once the server is ready, it prints one line with its address to stdout.
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
        sys.stdout.write(f"The sandbox chat is ready at {url}/ and takes messages at {url}/messages\n")
        sys.stdout.flush()
        await stop.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m followups.transports.sandbox.server", description="A chat server to try deliveries on."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument(
        "--secret",
        default=os.environ.get("FOLLOWUPS_TRANSPORT_SECRET") or None,
        help="deliveries must be signed with it (default: FOLLOWUPS_TRANSPORT_SECRET)",
    )
    parser.add_argument(
        "--no-dedup", dest="dedup", action="store_false", help="take a repeated idempotency-key for a new message"
    )
    parser.add_argument("--keep", type=int, default=KEEP_RECORDS, help="requests to keep (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
