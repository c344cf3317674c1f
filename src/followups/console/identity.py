"""Identification of the signed-in person, by the session cookie or by a trusted proxy's header."""

from __future__ import annotations

from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from followups.console.access import Viewer
from followups.console.zones import Zone
from followups.store import console_sessions, sending_hours
from followups.store.console_sessions import LIFETIME, Grant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.responses import Response
    from starlette.types import Scope

    from followups.console.services import ConsoleServices
    from followups.console.visit import Visit

LONGEST_NAME = 200


def identify(visit: Visit, scope: Scope) -> None:
    """Set the visit's viewer from a valid session, or sign in the person named by the proxy."""
    services = visit.services
    name = services.cookie_name(scope["scheme"])
    token = visit.cookies.get(name, "")
    told = _from_proxy_header(services, visit.headers, scope)
    role = services.settings.console_proxy_role or "viewer"
    with visit.transaction() as session:
        found = console_sessions.find(session, token) if token else None
        # If a person signed in through the proxy, the session is valid only while the proxy sends that person's name.
        # The session also ends if the configured role changes.
        if found is not None and found.way == "proxy" and (found.name, found.role) != (told, role):
            console_sessions.end(session, token)
            found = None
        if found is None and told:
            token = console_sessions.begin(session, Grant(role, None, told), "proxy")
            found = console_sessions.find(session, token)
            keep(visit, token, scope["scheme"])
        if found is None:
            return
        if found.stale:
            console_sessions.record_use(session, found.id)
        visit.viewer = Viewer(found)
        hours = sending_hours.find(session, found.workspace_id) if found.workspace_id else None
        visit.workspace_zone = Zone(hours.time_zone) if hours and services.is_zone(hours.time_zone) else None


def keep(visit: Visit, token: str, scheme: str) -> None:
    """Set the session cookie, which contains the session's token."""
    secure = visit.services.is_secure(scheme)
    visit.cookie(
        visit.services.cookie_name(scheme),
        token,
        max_age=int(LIFETIME.total_seconds()),
        path="/",
        secure=secure,
        httponly=True,
        samesite="lax",
    )


def is_known(services: ConsoleServices, cookies: Mapping[str, str], scheme: str) -> bool:
    """Return whether the cookie contains the token of a valid session."""
    token = cookies.get(services.cookie_name(scheme), "")
    if not token:
        return False
    with services.sessions() as session:
        return console_sessions.find(session, token) is not None


def _from_proxy_header(services: ConsoleServices, headers: Mapping[str, str], scope: Scope) -> str:
    """Return the person's name from a trusted proxy's header, or an empty string."""
    header = services.settings.console_proxy_header
    if header is None:
        return ""
    # the address of the connection's peer, regardless of the request's headers
    peer = scope.get("state", {}).get("peer")
    try:
        address = ip_address(peer[0]) if peer else None
    except ValueError:
        address = None
    if address is None or not any(address in network for network in services.proxies):
        return ""
    return headers.get(header, "").strip()[:LONGEST_NAME]


def ask_to_sign_in(visit: Visit) -> Response:
    """Return the response to a request without a valid session.

    A GET request is redirected to the sign-in page. For any method other than GET, the response is an error page.
    """
    if visit.method == "GET":
        wanted = {} if visit.path == "/" else {"next": visit.path}
        return visit.redirect("/login", **wanted)
    told = visit.t("You are not signed in, or your session has ended. Nothing has changed.")
    return visit.page("login.html", HTTPStatus.UNAUTHORIZED, told=told, next=_place(visit))


def _place(visit: Visit) -> str:
    """Return the page from which the form was sent, according to the Referer header."""
    try:
        path = urlsplit(visit.headers.get("referer", "")).path
    except ValueError:  # for example, a URL with an unclosed bracket
        return ""
    return path.removeprefix(visit.services.base) if path.startswith(f"{visit.services.base}/") else ""


def safe_place(wanted: str) -> str:
    r"""Return the path if it belongs to the console, otherwise ``/``.

    >>> safe_place("/follow-ups"), safe_place("//evil.example"), safe_place("https://evil.example"), safe_place("/\\x")
    ('/follow-ups', '/', '/', '/')
    """
    plain = wanted.startswith("/") and not wanted.startswith("//") and "\\" not in wanted and wanted.isprintable()
    return wanted if plain else "/"
