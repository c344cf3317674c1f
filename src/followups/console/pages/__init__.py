"""The pages, and the table of all routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from followups.console.access import Action
from followups.console.pages import (
    audit_log,
    bulk,
    chat,
    follow_up,
    follow_ups,
    login,
    new,
    overview,
    public,
    settings,
    system,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.responses import Response

    from followups.console.visit import Visit


@dataclass(frozen=True, slots=True)
class Route:
    """A method and a path under ``/console``, with the action that the caller must be allowed."""

    method: str
    path: str
    action: Action
    page: Callable[[Visit], Response]


ROUTES = (
    Route("GET", "/login", Action.PUBLIC, login.show),
    Route("POST", "/login", Action.PUBLIC, login.sign_in),
    Route("POST", "/logout", Action.PUBLIC, login.sign_out),
    Route("POST", "/preferences", Action.PUBLIC, public.prefer),
    Route("GET", "/static/{name}", Action.PUBLIC, public.static),
    Route("GET", "/", Action.SEE, overview.show),
    Route("GET", "/follow-ups", Action.SEE, follow_ups.show),
    Route("GET", "/follow-ups/new", Action.CHANGE, new.show),
    Route("POST", "/follow-ups/new", Action.CHANGE, new.schedule),
    Route("GET", "/follow-ups/{id}", Action.SEE, follow_up.show),
    Route("POST", "/follow-ups/{id}", Action.CHANGE, follow_up.save),
    Route("POST", "/follow-ups/{id}/message", Action.SEE, follow_up.reveal),
    Route("POST", "/follow-ups/{id}/cancel", Action.CHANGE, follow_up.cancel),
    Route("POST", "/follow-ups/{id}/send", Action.CHANGE, follow_up.send_now),
    Route("POST", "/follow-ups/{id}/retry", Action.CHANGE, follow_up.retry),
    Route("GET", "/chats/{id}", Action.SEE, chat.show),
    Route("GET", "/bulk", Action.SEE, bulk.history),
    Route("POST", "/bulk/preview", Action.CHANGE, bulk.preview),
    Route("POST", "/bulk", Action.CHANGE, bulk.start),
    Route("GET", "/bulk/{id}", Action.SEE, bulk.show),
    Route("POST", "/bulk/{id}/stop", Action.CHANGE, bulk.stop),
    Route("GET", "/settings", Action.SETTINGS, settings.show),
    Route("POST", "/settings/keys", Action.SETTINGS, settings.create_key),
    Route("GET", "/settings/keys/{id}", Action.SETTINGS, settings.ask_to_revoke),
    Route("POST", "/settings/keys/{id}/revoke", Action.SETTINGS, settings.revoke_key),
    Route("POST", "/settings/hours", Action.SETTINGS, settings.set_hours),
    Route("POST", "/settings/limits", Action.SETTINGS, settings.set_limit),
    Route("POST", "/settings/limits/clear", Action.SETTINGS, settings.clear_limit),
    Route("POST", "/settings/pauses", Action.SETTINGS, settings.pause),
    Route("POST", "/settings/pauses/resume", Action.SETTINGS, settings.resume),
    Route("POST", "/settings/sessions/{id}/end", Action.SETTINGS, settings.end_session),
    Route("GET", "/audit", Action.AUDIT, audit_log.show),
    Route("GET", "/system", Action.SYSTEM, system.show),
)
"""Every route. A test calls each one in every role, and with the ids of another workspace."""
