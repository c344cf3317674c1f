"""The overview page: counts by state, lag, throughput, and current problems."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from followups.operations.explain import STALE_TICK
from followups.store import last_tick, overview, pauses

if TYPE_CHECKING:
    from uuid import UUID

    from starlette.responses import Response

    from followups.console.services import ConsoleServices
    from followups.console.visit import Visit
    from followups.store.overview import OverviewFigures
    from followups.store.pauses import ActivePause

LATE = timedelta(minutes=1)
"""How long a follow-up must be overdue before the page shows a warning."""

MOST_PAUSES = 20
"""Maximum number of pauses shown."""


@dataclass(frozen=True, slots=True)
class OverviewSnapshot:
    """The numbers on the overview page, all read from the database at the same time."""

    numbers: OverviewFigures
    tick_age: timedelta | None
    pauses: list[ActivePause]


def show(visit: Visit) -> Response:
    """Show the overview. A session limited to one chat is redirected to the page of that chat."""
    viewer = visit.person
    if viewer.chat_id is not None:
        return visit.redirect(f"/chats/{viewer.chat_id}")
    services, workspace_id = visit.services, viewer.workspace_id
    look: OverviewSnapshot = services.results.get(("overview", workspace_id), lambda: _snapshot(services, workspace_id))
    late = look.numbers.oldest_due is not None and look.numbers.at - look.numbers.oldest_due > LATE
    return visit.page(
        "overview.html",
        look=look,
        most=overview.MOST,
        ticks_missing=look.tick_age is None or look.tick_age > STALE_TICK,
        late=late,
        bars=_bars(look.numbers.sent or []),
    )


def _snapshot(services: ConsoleServices, workspace_id: UUID | None) -> OverviewSnapshot:
    with services.engine.connect() as connection:
        return OverviewSnapshot(
            overview.read(connection, workspace_id),
            last_tick.last_tick_age(connection),
            pauses.in_force(connection, workspace_id, MOST_PAUSES),
        )


def _bars(sent: list[int]) -> list[tuple[int, float]]:
    """Return the x position and height of each minute's bar, in a drawing of 600 by 100 units."""
    most = max(sent, default=0)
    return [(10 * minute, 100 * number / most) for minute, number in enumerate(sent) if number]
