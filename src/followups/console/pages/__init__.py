"""The pages, and the table of all routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from followups.console.access import Action
from followups.console.pages import login, overview, public

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.responses import Response

    from followups.console.visit import Visit


@dataclass(frozen=True, slots=True)
class Route:
    """A method and a path under ``/console``, and what it takes to call it."""

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
)
"""Every route. A test calls each one in every role, and with the ids of another workspace."""
