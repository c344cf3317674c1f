"""The console's pages, and the table of all routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from followups.console.access import Permission
from followups.console.pages import audit_log, bulk, chat, follow_up, follow_ups, login, new, overview, settings, system

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.responses import Response

    from followups.console.visit import Visit


@dataclass(frozen=True, slots=True)
class Route:
    """A method and a path under ``/console``, with the permission that the route requires."""

    method: str
    path: str
    action: Permission
    page: Callable[[Visit], Response]


ROUTES = (
    Route("GET", "/login", Permission.PUBLIC, login.show),
    Route("POST", "/login", Permission.PUBLIC, login.sign_in),
    Route("POST", "/logout", Permission.PUBLIC, login.sign_out),
    Route("POST", "/preferences", Permission.PUBLIC, login.prefer),
    Route("GET", "/static/{name}", Permission.PUBLIC, login.static),
    Route("GET", "/", Permission.SEE, overview.show),
    Route("GET", "/follow-ups", Permission.SEE, follow_ups.show),
    Route("GET", "/follow-ups/new", Permission.CHANGE, new.show),
    Route("POST", "/follow-ups/new", Permission.CHANGE, new.schedule),
    Route("GET", "/follow-ups/{id}", Permission.SEE, follow_up.show),
    Route("POST", "/follow-ups/{id}", Permission.CHANGE, follow_up.save),
    Route("POST", "/follow-ups/{id}/message", Permission.SEE, follow_up.reveal),
    Route("POST", "/follow-ups/{id}/cancel", Permission.CHANGE, follow_up.cancel),
    Route("POST", "/follow-ups/{id}/send", Permission.CHANGE, follow_up.send_now),
    Route("POST", "/follow-ups/{id}/retry", Permission.CHANGE, follow_up.retry),
    Route("GET", "/chats/{id}", Permission.SEE, chat.show),
    Route("GET", "/bulk", Permission.SEE, bulk.history),
    Route("POST", "/bulk/preview", Permission.CHANGE, bulk.preview),
    Route("POST", "/bulk", Permission.CHANGE, bulk.start),
    Route("GET", "/bulk/{id}", Permission.SEE, bulk.show),
    Route("POST", "/bulk/{id}/stop", Permission.CHANGE, bulk.stop),
    Route("GET", "/settings", Permission.SETTINGS, settings.show),
    Route("POST", "/settings/keys", Permission.SETTINGS, settings.create_key),
    Route("GET", "/settings/keys/{id}", Permission.SETTINGS, settings.ask_to_revoke),
    Route("POST", "/settings/keys/{id}/revoke", Permission.SETTINGS, settings.revoke_key),
    Route("POST", "/settings/hours", Permission.SETTINGS, settings.set_hours),
    Route("POST", "/settings/limits", Permission.SETTINGS, settings.set_limit),
    Route("POST", "/settings/limits/clear", Permission.SETTINGS, settings.clear_limit),
    Route("POST", "/settings/pauses", Permission.SETTINGS, settings.pause),
    Route("POST", "/settings/pauses/resume", Permission.SETTINGS, settings.resume),
    Route("POST", "/settings/sessions/{id}/end", Permission.SETTINGS, settings.end_session),
    Route("GET", "/audit", Permission.AUDIT, audit_log.show),
    Route("GET", "/system", Permission.SYSTEM, system.show),
)
"""All routes. A test calls each route with every role, and with ids that belong to another workspace."""
