"""Console access: a session's permissions, the origin check, and the limit on failed sign-ins."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from followups.store.console_sessions import ValidSession


class Permission(StrEnum):
    """A permission that a console route requires."""

    PUBLIC = "public"
    """The permission for routes that need no session, such as sign-in."""
    SEE = "see"
    CHANGE = "change"
    """The permission to schedule, change, cancel, retry and immediately send follow-ups."""
    SETTINGS = "settings"
    AUDIT = "audit"
    SYSTEM = "system"


_VIEWER = frozenset({Permission.SEE})
_AGENT = _VIEWER | {Permission.CHANGE}
_ADMIN = _AGENT | {Permission.SETTINGS, Permission.AUDIT}
_OPERATOR = _ADMIN | {Permission.SYSTEM}
ALLOWED = {"viewer": _VIEWER, "agent": _AGENT, "admin": _ADMIN, "operator": _OPERATOR}
"""The permissions of each role."""

WHOLE_WORKSPACE = frozenset({Permission.SETTINGS, Permission.AUDIT, Permission.SYSTEM})
"""Permissions that a session for a single chat never has, whatever its role."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """A signed-in person with a valid session."""

    session: ValidSession

    def may(self, action: Permission) -> bool:
        """Return whether the viewer's role has the permission."""
        if action in WHOLE_WORKSPACE and self.session.chat_id is not None:
            return False
        return action is Permission.PUBLIC or action in ALLOWED[self.session.role]

    @property
    def workspace_id(self) -> UUID | None:
        """The workspace that the session is limited to, or None if it sees all workspaces."""
        return self.session.workspace_id

    @property
    def chat_id(self) -> UUID | None:
        """The only chat that the session may show, or None if it may show all chats of its workspace."""
        return self.session.chat_id

    @property
    def sees_texts(self) -> bool:
        """Whether message texts are visible without a click; true only for members of the workspace."""
        return self.session.workspace_id is not None

    def sees(self, workspace_id: UUID, chat_id: UUID) -> bool:
        """Return whether this session may see a chat and everything in it."""
        return self.workspace_id in {None, workspace_id} and self.chat_id in {None, chat_id}


OWN_SITES = frozenset({"same-origin", "none"})
"""Values of Sec-Fetch-Site for requests from a console page or from the browser's address bar."""


def own_origin(public_url: str | None, scheme: str, host: str) -> str:
    """Return the console's origin: scheme, host and port.

    The origin is that of FOLLOWUPS_PUBLIC_URL if this is set, and otherwise that of the request's URL.

    >>> own_origin("https://chat.example/followups", "http", "10.0.0.7:8000")
    'https://chat.example'
    """
    if public_url is None:
        return _plain(f"{scheme}://{host}")
    return _plain(public_url)


def origin_refusal(headers: Mapping[str, str], own: str, *, configured: bool) -> Sentence | None:
    """Return why the request is refused, or None for requests from the console's own pages.

    >>> origin_refusal({"origin": "http://localhost:8000"}, "http://localhost:8000", configured=False)
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if configured:
        hint = Sentence(
            "According to FOLLOWUPS_PUBLIC_URL, the console is at {own}; correct the setting if that is wrong.", own=own
        )
    else:
        hint = Sentence(
            "The request arrived at {own}; behind a proxy, set FOLLOWUPS_PUBLIC_URL to the address that people use.",
            own=own,
        )
    if site is not None and site not in OWN_SITES:
        return Sentence("The request comes from another site.") + hint
    if origin is None and site is None:
        return Sentence("The request has neither an Origin nor a Sec-Fetch-Site header.") + hint
    if origin is not None and _plain(origin) != own:
        return Sentence("The request comes from another origin.") + hint
    return None


def _plain(url: str) -> str:
    """Return the scheme, host and port of an origin, without a default port.

    >>> _plain("HTTPS://Chat.Example:443/x"), _plain("http://[::1]:8000")
    ('https://chat.example', 'http://[::1]:8000')
    """
    try:
        parts = urlsplit(url.lower())
    except ValueError:  # for example, a URL with an unclosed bracket
        return ""
    host, default = parts.netloc.rpartition("@")[2], {"https": ":443", "http": ":80"}.get(parts.scheme, "")
    return f"{parts.scheme}://{host.removesuffix(default) if default else host}"


MAX_BY_CLIENT = 10
"""Maximum number of failed sign-ins by one client within `COUNTED_FOR`."""

MAX_IN_ALL = 600
"""Maximum number of failed sign-ins within `COUNTED_FOR` in this process, by all clients together."""

COUNTED_FOR = 60.0
"""Length of the period in which failed sign-ins are counted, in seconds."""

MAX_CLIENTS = 10_000
"""Maximum number of clients whose failed sign-ins are remembered."""


class FailedSignIns:
    """Counts the failed sign-ins of the last minute."""

    def __init__(self) -> None:
        """Create the counter with no failed sign-ins."""
        self._failed: dict[str, list[float]] = {}
        self._all: list[float] = []
        self._lock = threading.Lock()

    def wait(self, client: str) -> float:
        """Return the seconds until the client may sign in again, or 0 if it may sign in now."""
        now = time.monotonic()
        with self._lock:
            mine = _last_minute(self._failed.get(network_of(client), []), now)
            self._all = _last_minute(self._all, now)
            waits = [
                each[0] + COUNTED_FOR - now
                for each, most in ((mine, MAX_BY_CLIENT), (self._all, MAX_IN_ALL))
                if len(each) >= most
            ]
            return max(waits, default=0.0)

    def record(self, client: str) -> None:
        """Record that a sign-in by the client has failed."""
        now, network = time.monotonic(), network_of(client)
        with self._lock:
            self._failed[network] = [*_last_minute(self._failed.pop(network, []), now), now]
            self._all.append(now)
            if len(self._failed) > MAX_CLIENTS:
                del self._failed[next(iter(self._failed))]


def _last_minute(moments: list[float], now: float) -> list[float]:
    return [each for each in moments if each > now - COUNTED_FOR]


def network_of(client: str) -> str:
    """Return the network that is treated as one client: an IPv4 address or an IPv6 /64 network.

    >>> network_of("10.0.0.7"), network_of("2001:db8::1"), network_of("")
    ('10.0.0.7', '2001:db8::/64', '')
    """
    try:
        address = ip_address(client)
    except ValueError:
        return client
    return str(address) if address.version == 4 else str(ip_network(f"{address}/64", strict=False))  # noqa: PLR2004 - IPv4
