"""Nudges: a commit requests a tick if it makes a follow-up due before the next regular tick."""

from __future__ import annotations

from typing import TYPE_CHECKING

from web import Api, in_days, served

if TYPE_CHECKING:
    from followups.settings import Settings
    from world import World

SOON = 0.1 / 86_400
"""A due date, in days from now, that falls within the next two ticks."""


def test_nudge(settings: Settings, world: World) -> None:
    """If a change may make a follow-up due, a tick is requested.

    No tick is requested for a change that cannot make a follow-up due.
    """
    nudges: list[int] = []

    def nudge() -> None:
        nudges.append(world.scalar("SELECT count(*) FROM follow_ups"))

    with served(settings, nudge) as place:
        api = Api(f"http://{place[0]}:{place[1]}", world)
        with api.client:
            later = api.create(due=in_days(1))
            api.patch(later, message="x")
            api.message(later["chatId"], "agent")
            assert nudges == []
            api.create(due=in_days(-1))
            assert nudges == [2]  # the new follow-up's row was already committed
            api.patch(later, dueDate=in_days(SOON))
            assert nudges == [2, 2]
            api.patch(later, status="cancelled")
            assert nudges == [2, 2, 2]
            api.patch(later, status="cancelled")
            api.patch(later, message="refused")
            assert nudges == [2, 2, 2]
