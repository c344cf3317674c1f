"""The address that a transport delivers to: required, well-formed, and shown without its password."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from followups.errors import FollowUpsError, TransportConfigurationError
from followups.settings import hide_password

if TYPE_CHECKING:
    from datetime import timedelta

    from followups.settings import Settings

PORTS = {"http": 80, "https": 443}


def required_url(settings: Settings, meaning: str) -> str:
    """Return ``FOLLOWUPS_TRANSPORT_URL``; ``meaning`` completes "set it to ...".

    Raises `TransportConfigurationError` when it is missing or is no URL with a host.
    """
    url = settings.transport_url
    if url is None:
        message = f"The transport {settings.transport} needs FOLLOWUPS_TRANSPORT_URL: set it to {meaning}."
        raise TransportConfigurationError(message)
    if not _is_well_formed(url):
        message = f"FOLLOWUPS_TRANSPORT_URL ({hide_password(url)}) is no valid address: set it to {meaning}."
        raise TransportConfigurationError(message)
    return url


def _is_well_formed(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        return (
            bool(host)
            and parts.port != 0
            and not any(c.isspace() or not c.isprintable() for c in url)
            and _fits_basic_authentication(unquote(parts.username or ""), unquote(parts.password or ""))
        )
    except ValueError:  # a port that is no number, an unbalanced bracket, an empty label
        return False


def _fits_basic_authentication(user: str, password: str) -> bool:
    # RFC 7617: the first colon ends the name. What is not Latin-1 aiohttp refuses, too late for a sentence about it.
    return ":" not in user and max(user + password, default="") <= "\xff"


async def reach(url: str, within: timedelta) -> str:
    """Connect to the host of ``url`` (TLS for https), send nothing, and say so in one sentence.

    Raises `FollowUpsError`, naming the address without its password, when that does not work.
    """
    parts, shown = urlsplit(url), hide_password(url)
    try:
        async with asyncio.timeout(within.total_seconds()):
            await _connect_and_hang_up(parts)
    except TimeoutError:
        message = f"{shown} cannot be reached: no connection within {within.total_seconds():g} s."
    except OSError as error:
        message = f"{shown} cannot be reached: {_said(error)}; start it, or correct FOLLOWUPS_TRANSPORT_URL."
    else:
        how = "over TLS" if parts.scheme == "https" else "over TCP"
        return f"{shown} accepts connections {how}; no message was sent."
    raise FollowUpsError(message) from None


async def _connect_and_hang_up(parts: SplitResult) -> None:
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    _, writer = await asyncio.open_connection(parts.hostname, parts.port or PORTS[parts.scheme], ssl=secure)
    writer.close()
    with contextlib.suppress(OSError):  # it answered; how it hangs up does not matter
        await writer.wait_closed()


def _said(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({tls_reason(error)})"
    if isinstance(error, socket.gaierror) or not error.errno:  # numbers of its own; several addresses, several errors
        return error.strerror or str(error)
    return os.strerror(error.errno)


def tls_reason(error: ssl.SSLError) -> str:
    """Return in a few words why TLS failed: ``self-signed certificate``, ``WRONG_VERSION_NUMBER``."""
    return getattr(error, "verify_message", "") or error.reason or type(error).__name__
