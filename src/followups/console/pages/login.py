"""Routes without a session: sign-in by API key or link, sign-out, static files and preferences."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.responses import Response

from followups.console import assets, identity
from followups.console.identity import safe_place
from followups.console.language import LANGUAGES
from followups.errors import NotFoundError
from followups.models import ApiKey
from followups.store import api_keys, console_sessions
from followups.store.console_sessions import Grant
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from followups.console.visit import Visit


log = get_logger(__name__)


def show(visit: Visit) -> Response:
    """Show the sign-in form, even to a signed-in person, because sign-in links lead to this page."""
    return visit.page("login.html", told="", next=identity.safe_place(visit.query.text("next", "/")))


def sign_in(visit: Visit) -> Response:
    """Sign in with an API key or link token, and redirect to the requested page."""
    wanted = identity.safe_place(visit.form.text("next", "/"))
    secret = visit.form.text("secret").rpartition("#token=")[2]
    with visit.transaction() as session:
        token = _begin(session, secret)
        if token and (old := visit.cookies.get(visit.services.cookie_name(visit.scheme))):
            console_sessions.end(session, old)
    # Only failed sign-ins count towards the limit. Even if other clients at the same address have failed to sign in, a
    # valid key is accepted.
    if token is None and (wait := visit.services.failed_sign_ins.wait(visit.client)):
        told = visit.t("Too many attempts; try again in {seconds} seconds.", seconds=math.ceil(wait))
        response = visit.page("login.html", HTTPStatus.TOO_MANY_REQUESTS, told=told, next=wanted)
        response.headers["retry-after"] = str(math.ceil(wait))
        return response
    if token is None:
        visit.services.failed_sign_ins.record(visit.client)
        log.info("console_sign_in_refused")
        told = visit.t("This is neither a valid API key nor the token of a link that can still be used.")
        return visit.page("login.html", HTTPStatus.UNAUTHORIZED, told=told, next=wanted)
    identity.keep(visit, token, visit.scheme)
    return visit.go(wanted)


def _begin(session: Session, secret: str) -> str | None:
    """Begin a session for the owner of the given API key or sign-in token.

    Return the session's token, or None if the API key or token is invalid.
    """
    if grant := console_sessions.use_link(session, secret):
        return console_sessions.begin(session, grant, "link")
    found = api_keys.authenticate(session, secret)
    if found is None:
        return None
    name = session.get_one(ApiKey, found.key_id).title
    return console_sessions.begin(session, Grant("agent", found.workspace_id, name, None, found.key_id), "key")


def sign_out(visit: Visit) -> Response:
    """End the person's session."""
    name = visit.services.cookie_name(visit.scheme)
    if token := visit.cookies.get(name):
        with visit.transaction() as session:
            console_sessions.end(session, token)
    visit.cookie(name, "", max_age=0, path="/", secure=visit.services.is_secure(visit.scheme), httponly=True)
    return visit.redirect("/login")


YEAR = 365 * 24 * 60 * 60


def static(visit: Visit) -> Response:
    """Return a static file."""
    asset = assets.BY_NAME.get(visit.parameters["name"])
    if asset is None:
        raise NotFoundError
    return Response(asset.content, media_type=asset.media_type, headers=assets.KEPT)


def prefer(visit: Visit) -> Response:
    """Store the person's choice of language and time zone in cookies."""
    chosen, zone = visit.form.text("language"), visit.form.text("zone")
    if chosen in LANGUAGES:
        visit.cookie("followups_language", chosen, max_age=YEAR, samesite="lax", httponly=True)
    if visit.services.is_zone(zone):
        visit.cookie("followups_zone", zone, max_age=YEAR, samesite="lax")
    return visit.redirect(safe_place(visit.form.text("next", "/")))
