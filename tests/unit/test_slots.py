"""How many may begin: for the slots that are free, and for those that come free meanwhile."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.dispatch.slots import Slots

BEGIN = 0.015
"""Seconds from one batch to the next."""


def looked_ahead(*gaps: tuple[int, float]) -> Slots:
    """Return a hundred slots after so many calls each ended so many seconds after the one before."""
    slots = Slots(100, ahead=True)
    now = 0.0
    for number, gap in gaps:
        for _ in range(number):
            now += gap
            slots.note_end(now)
    slots.note_begin(BEGIN)
    return slots


@pytest.mark.parametrize(
    ("between", "room"), [(0.0005, 160), (0.001, 130), (0.1, 100), (0.00001, 200), (0.0, 200)], ids=str
)
def test_as_many_more_as_come_free(between: float, room: int) -> None:
    """As many as calls end in the time of two begins; never more than there are slots."""
    slots = looked_ahead((10, between * 1.0001))
    assert slots.room == pytest.approx(room, abs=1)
    room = slots.room
    slots.take(room)
    assert slots.room == 0
    slots.leave(7)
    assert slots.room == 7


def test_none_ahead() -> None:
    """Where nobody may begin ahead, and while no two calls have ended yet, there is room for the free slots only."""
    slots = Slots(100, ahead=False)
    for now in range(5):
        slots.note_end(now / 1000)
    slots.note_begin(BEGIN)
    assert slots.room == 100
    assert looked_ahead((1, 0.0)).room == 100


def test_calls_that_hang() -> None:
    """After a hundred that hung and ended together hardly anybody begins ahead; when calls flow again, many do."""
    flow = (200, 0.0005)
    assert 155 <= looked_ahead(flow).room <= 160
    assert 100 <= looked_ahead(flow, (1, 10.0), (99, 0.0)).room <= 102
    assert 150 <= looked_ahead(flow, (1, 10.0), (99, 0.0), (600, 0.0005)).room <= 160


def test_less_room_than_has_begun() -> None:
    """Where fewer come free than was thought there is no room, and not less than none."""
    slots = looked_ahead((200, 0.0005))
    begun = slots.room
    slots.take(begun)
    slots.note_end(1000.0)
    slots.note_begin(BEGIN)
    assert slots.room == 0
    slots.leave(begun - 100)
    assert slots.room == 0
    slots.leave()
    assert slots.room == 1


@given(number=st.integers(1, 20), more=st.integers(0, 20))
async def test_no_more_calls_at_once_than_slots(number: int, more: int) -> None:
    """Whoever has begun for a slot that is not free waits for it, in the order of asking; one that fails leaves it."""
    slots = Slots(number, ahead=True)
    inside = most = 0
    order: list[int] = []

    async def call(name: int) -> None:
        nonlocal inside, most
        async with slots:
            order.append(name)
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1
            if name % 2:
                raise ValueError

    await asyncio.gather(*(call(name) for name in range(number + more)), return_exceptions=True)
    assert most == number
    assert order == list(range(number + more))
