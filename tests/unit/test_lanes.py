"""Turns at the slots: each workspace goes in its turn, each of its own at its moment, and none has all the slots."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.delivery import fair_queue
from followups.delivery.clock import DatabaseClock
from followups.delivery.due_queue import Line
from followups.store.leases import Lease
from followups.uptime import uptime

SECOND = timedelta(seconds=1)
NOISY, QUIET = 1, 2


def line_of(slots: int = 100) -> Line:
    """Return a line whose clock is this machine's."""
    clock = DatabaseClock()
    clock.observe(datetime.now(UTC), uptime(), uptime())
    return Line(clock, timedelta(seconds=60), slots)


def overdue(lane: int, *seconds: float, losses: int = 0) -> list[Lease]:
    """Return leases of a workspace, each due so many seconds ago."""
    return [Lease(uuid4(), 1, datetime.now(UTC) - ago * SECOND, losses, lane) for ago in seconds]


def test_turns() -> None:
    """However much one workspace has in front of another, they alternate, and each one's earliest goes first."""
    line = line_of()
    line.add(overdue(NOISY, *range(10, 60)))
    line.add(overdue(QUIET, 1, 2))
    taken = [hinted.lease for hinted in line.take(6)]
    assert [lease.lane for lease in taken] == [NOISY, QUIET, NOISY, QUIET, NOISY, NOISY]
    for lane in (NOISY, QUIET):
        moments = [lease.due for lease in taken if lease.lane == lane]
        assert moments == sorted(moments)


def test_turns_go_on_from_one_free_slot_to_the_next() -> None:
    """If slots become free one by one, the workspaces still alternate."""
    line = line_of()
    line.add(overdue(NOISY, *range(50)) + overdue(QUIET, *range(3)))
    assert Counter(line.take(1)[0].lease.lane for _ in range(6)) == {NOISY: 3, QUIET: 3}


def test_nobody_is_told_their_workspace() -> None:
    """Leases without a workspace number, as from an older worker during an upgrade, go by their moment."""
    line = line_of()
    given_leases = overdue(0, 3, 1, 2)
    line.add(given_leases)
    assert [hinted.lease for hinted in line.take(9)] == sorted(given_leases, key=lambda lease: lease.due)


def test_not_all_slots_for_one() -> None:
    """Beside another, a workspace holds seven eighths of the slots, and may take again what it returns."""
    line = line_of(slots=16)
    line.add(overdue(QUIET, 1))
    (quiet,) = line.take(16)
    line.leave(quiet)
    line.add(overdue(NOISY, *range(50)))
    out = line.take(16)
    assert len(out) == 14
    assert not line.is_anybodys_moment()
    assert line.seconds_to_next() is None
    line.add(overdue(QUIET, 1, 1, 1))
    assert [hinted.lease.lane for hinted in line.take(2)] == [QUIET, QUIET]
    line.leave(out[0])
    assert Counter(hinted.lease.lane for hinted in line.take(2)) == {QUIET: 1, NOISY: 1}
    assert not [hinted for hinted in line.take(1) if hinted.lease.lane == NOISY]


def test_all_slots_for_a_lone_one() -> None:
    """A workspace without any other active one takes all slots."""
    line = line_of(slots=16)
    line.add(overdue(NOISY, *range(50)))
    assert len(line.take(16)) == 16


def test_all_slots_when_the_others_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No slots are kept free for workspaces that have been inactive for long."""
    line = line_of(slots=16)
    line.add(overdue(QUIET, 1))
    line.leave(line.take(1)[0])
    line.add(overdue(NOISY, *range(50)))
    monkeypatch.setattr(fair_queue, "LATELY", 0.0)
    assert len(line.take(16)) == 16


@pytest.mark.parametrize("slots", [1, 2])
def test_few_slots(slots: int) -> None:
    """Where there is one slot, it goes round; of two, one workspace gets one."""
    line = line_of(slots)
    line.add(overdue(NOISY, *range(5)) + overdue(QUIET, *range(5)))
    for _ in range(4):
        out = line.take(slots)
        assert len(out) == slots
        assert len({hinted.lease.lane for hinted in out}) == slots
        for hinted in out:
            line.leave(hinted)


def test_what_is_given_back() -> None:
    """Emptying the queue returns everything that waits for its moment, its turn, or a slot."""
    line = line_of(slots=2)
    waiting = overdue(NOISY, 1, 2, 3) + overdue(QUIET, -30)
    line.add(waiting)
    (out,) = line.take(2)
    assert {lease.id for lease in line.clear()} == {lease.id for lease in waiting} - {out.lease.id}
    line.leave(out)
    assert line.take(2) == []


steps = st.lists(
    st.tuples(st.sampled_from(["add", "take", "leave", "put off"]), st.integers(0, 4), st.integers(0, 3)), max_size=60
)


@given(steps, st.integers(1, 9))
def test_each_is_taken_once(steps: list[tuple[str, int, int]], slots: int) -> None:
    """In any order of arrivals, takes and deferrals, each is taken once, and never more than there are slots."""
    line, out, come, taken = line_of(slots), [], 0, Counter()
    for step, lane, count in steps:
        if step == "add":
            line.add(overdue(lane, *range(count), losses=count == 3))
            come += count
        elif step == "take":
            now = line.take(min(count, slots - len(out)))
            taken.update(hinted.lease.id for hinted in now)
            out += now
        elif out:
            hinted = out.pop(lane % len(out))
            line.leave(hinted)
            line.let_go([hinted.lease.id])
            if step == "put off":
                line.put_off(hinted, timedelta(0))
                taken[hinted.lease.id] -= 1
    rest = [lease.id for lease in line.clear()]
    assert len(rest) == len(set(rest))
    assert set(taken.values()) <= {0, 1}
    assert taken.total() + len(rest) == come


def test_nobody_is_kept_whose_lease_has_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing may go, expired leases make room for new ones."""
    line = line_of()
    line.add(overdue(NOISY, *range(50)) + overdue(QUIET, 1))
    assert line.take(0) == []
    now = uptime()
    monkeypatch.setattr(time, "clock_gettime", lambda _clock: now + 61)
    anew = overdue(NOISY, 1, 2)
    line.add(anew)
    assert sorted(line.clear(), key=lambda lease: lease.due) == sorted(anew, key=lambda lease: lease.due)
    line.add(overdue(QUIET, 1))
    assert [hinted.lease.lane for hinted in line.take(9)] == [QUIET]


def test_shedding() -> None:
    """Shedding keeps a given number in some workspace queues, in equal shares, earliest first.

    The other queues share what one of them does not need.
    """
    line = line_of()
    line.add(overdue(NOISY, *range(30)) + overdue(QUIET, 5) + overdue(3, *range(20)) + overdue(4, *range(9)))
    held = frozenset({NOISY, QUIET, 3})
    taken_first = line.take(0)
    shed = [hinted.lease for hinted in line.shed(held, 9)]
    assert taken_first == []
    assert Counter(lease.lane for lease in shed) == {NOISY: 26, 3: 16}
    assert [lease.due for lease in shed] == sorted(lease.due for lease in shed)
    assert line.count(held) == 9
    assert line.shed(held, 9) == []
    left = [hinted.lease for hinted in line.take(99)]
    assert Counter(lease.lane for lease in left) == {NOISY: 4, QUIET: 1, 3: 4, 4: 9}
    for lane in (NOISY, 3):
        assert max(one.due for one in left if one.lane == lane) < min(one.due for one in shed if one.lane == lane)


def test_a_lane_that_is_shed_has_no_turn() -> None:
    """With more workspace queues than may stay, some are emptied and later return like new ones."""
    line = line_of()
    line.add([lease for lane in range(1, 6) for lease in overdue(lane, 1)])
    line.take(0)
    assert len(line.shed(frozenset(range(1, 6)), 2)) == 3
    line.add(overdue(1, 2) + overdue(2, 2))
    assert len(line.take(99)) == 4
