"""The sockets of `web`, on all IPv6 and IPv4 addresses, with an optional port for `/metrics`."""

from __future__ import annotations

import os
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING

from followups.api import problems
from followups.errors import FollowUpsError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

BACKLOG = 2048
"""Maximum number of connections that wait in the kernel's queue to be accepted."""

METRICS = "/metrics"
MAPPED = "::ffff:"
"""Prefix that an IPv4 address has on an IPv6 socket."""


class ListeningError(FollowUpsError):
    """The server cannot listen on the port."""

    slug = "listening"


def listen(host: str, port: int) -> socket.socket:
    """Listen on one address, or on all addresses if ``host`` is empty. Raises `ListeningError`."""
    everywhere = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=everywhere)
    except OSError as error:
        message = f"web cannot listen on port {port}: {os.strerror(error.errno or 0)}; set PORT to a free one"
        raise ListeningError(message) from error


def plain(address: tuple[str, int] | None) -> tuple[str, int] | None:
    """Return a client's address and port, with an IPv4-mapped IPv6 address written as IPv4.

    >>> plain(("::ffff:192.0.2.1", 4000)), plain(("2001:db8::1", 4000))
    (('192.0.2.1', 4000), ('2001:db8::1', 4000))
    """
    return (address[0].removeprefix(MAPPED), address[1]) if address else None


class MetricsPort:
    """ASGI middleware that serves only `/metrics` on the metrics port, and `/metrics` on no other port."""

    def __init__(self, app: ASGIApp, port: int | None) -> None:
        """Wrap the application. ``port`` is None if `/metrics` has no separate port."""
        self._app, self._port = app, port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, or respond with 404 if this port does not serve the path."""
        if self._port and scope["type"] == "http" and (scope["path"] == METRICS) != (scope["server"][1] == self._port):
            nothing = problems.of_status(HTTPStatus.NOT_FOUND, "There is nothing at this path.")
            await nothing.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)
