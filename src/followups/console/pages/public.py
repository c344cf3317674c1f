"""Routes that need no session: static files, and the choice of language and time zone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import Response

from followups.console import assets
from followups.console.identity import safe_place
from followups.console.language import LANGUAGES
from followups.errors import NotFoundError

if TYPE_CHECKING:
    from followups.console.visit import Visit

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
