"""The fair queue: workspaces take turns, each in due order, and none occupies all slots."""

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
from followups.delivery.due_queue import DueQueue
from followups.delivery.slots import Slots
from followups.store.leases import Lease
from followups.uptime import uptime

SECOND = timedelta(seconds=1)
NOISY, QUIET = 1, 2


def queue_of(slots: int = 100) -> DueQueue:
    """Return a due queue that uses this machine's clock."""
    clock = DatabaseClock()
    clock.observe(datetime.now(UTC), uptime(), uptime())
    return DueQueue(clock, timedelta(seconds=60), Slots(slots))


def overdue(key: int, *seconds: float, losses: int = 0) -> list[Lease]:
    """Return leases of a workspace, each due the given number of seconds ago."""
    return [Lease(uuid4(), 1, datetime.now(UTC) - ago * SECOND, losses, key) for ago in seconds]


def test_workspaces_take_turns() -> None:
    """Workspaces take turns, and each workspace's leases are taken in due order."""
    queue = queue_of()
    queue.add(overdue(NOISY, *range(10, 60)))
    queue.add(overdue(QUIET, 1, 2))
    taken = queue.take(6)
    assert [lease.key for lease in taken] == [NOISY, QUIET, NOISY, QUIET, NOISY, NOISY]
    for key in (NOISY, QUIET):
        moments = [lease.due for lease in taken if lease.key == key]
        assert moments == sorted(moments)


def test_turns_continue_with_single_slots() -> None:
    """Workspaces take turns even if only one slot becomes free at a time."""
    queue = queue_of()
    queue.add(overdue(NOISY, *range(50)) + overdue(QUIET, *range(3)))
    assert Counter(queue.take(1)[0].key for _ in range(6)) == {NOISY: 3, QUIET: 3}


def test_leases_without_a_workspace_key() -> None:
    """Leases from an older worker have no workspace key and are taken in due order."""
    queue = queue_of()
    given_leases = overdue(0, 3, 1, 2)
    queue.add(given_leases)
    assert [lease.id for lease in queue.take(9)] == [
        lease.id for lease in sorted(given_leases, key=lambda lease: lease.due)
    ]


def test_one_workspace_does_not_get_all_slots() -> None:
    """If other workspaces are active, a workspace occupies at most seven eighths of the slots.

    A workspace can reuse the slots that it has released.
    """
    queue = queue_of(slots=16)
    queue.add(overdue(QUIET, 1))
    (quiet,) = queue.take(16)
    queue.slots.release(quiet)
    queue.add(overdue(NOISY, *range(50)))
    out = queue.take(16)
    assert len(out) == 14
    assert not queue.is_due()
    assert queue.seconds_to_next() is None
    queue.add(overdue(QUIET, 1, 1, 1))
    quiet, other = queue.take(2)
    assert (quiet.key, other.key) == (QUIET, QUIET)
    queue.slots.release(quiet)
    queue.slots.release(out[0])
    assert Counter(lease.key for lease in queue.take(2)) == {QUIET: 1, NOISY: 1}
    assert not [lease for lease in queue.take(1) if lease.key == NOISY]


def test_a_single_workspace_gets_all_slots() -> None:
    """A workspace uses all slots if no other workspace is active."""
    queue = queue_of(slots=16)
    queue.add(overdue(NOISY, *range(50)))
    assert len(queue.take(16)) == 16


def test_all_slots_after_the_others_are_inactive(monkeypatch: pytest.MonkeyPatch) -> None:
    """No slots are reserved for workspaces that have long been inactive."""
    queue = queue_of(slots=16)
    queue.add(overdue(QUIET, 1))
    queue.slots.release(queue.take(1)[0])
    queue.add(overdue(NOISY, *range(50)))
    monkeypatch.setattr(fair_queue, "ACTIVE", 0.0)
    assert len(queue.take(16)) == 16


@pytest.mark.parametrize("slots", [1, 2])
def test_few_slots(slots: int) -> None:
    """With one slot, workspaces take turns; with two slots, two workspaces get one each."""
    queue = queue_of(slots)
    queue.add(overdue(NOISY, *range(5)) + overdue(QUIET, *range(5)))
    for _ in range(4):
        out = queue.take(slots)
        assert len(out) == slots
        assert len({lease.key for lease in out}) == slots
        for lease in out:
            queue.slots.release(lease)


def test_emptying_returns_every_lease() -> None:
    """Emptying the queue returns all leases, whether they wait for their due time, a turn or a slot."""
    queue = queue_of(slots=2)
    waiting = overdue(NOISY, 1, 2, 3) + overdue(QUIET, -30)
    queue.add(waiting)
    (out,) = queue.take(2)
    assert {lease.id for lease in queue.clear()} == {lease.id for lease in waiting} - {out.id}
    queue.slots.release(out)
    assert queue.take(2) == []


steps = st.lists(
    st.tuples(st.sampled_from(["add", "take", "leave", "defer"]), st.integers(0, 4), st.integers(0, 3)), max_size=60
)


@given(steps, st.integers(1, 9))
def test_each_is_taken_once(steps: list[tuple[str, int, int]], slots: int) -> None:
    """Whatever the order of arrivals, takes and deferrals, each lease is taken exactly once.

    The number of leases taken never exceeds the number of slots.
    """
    queue, out, come, taken = queue_of(slots), [], 0, Counter()
    for step, key, count in steps:
        if step == "add":
            queue.add(overdue(key, *range(count), losses=count == 3))
            come += count
        elif step == "take":
            now = queue.take(count)
            taken.update(lease.id for lease in now)
            out += now
        elif out:
            lease = out.pop(key % len(out))
            queue.slots.release(lease)
            queue.slots.release_poison_quota([lease.id])
            if step == "defer":
                queue.defer(lease, timedelta(0))
                taken[lease.id] -= 1
    rest = [lease.id for lease in queue.clear()]
    assert len(rest) == len(set(rest))
    assert set(taken.values()) <= {0, 1}
    assert taken.total() + len(rest) == come


def test_expired_leases_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """While no lease can be taken, the queue removes expired leases to make room."""
    queue = queue_of()
    queue.add(overdue(NOISY, *range(50)) + overdue(QUIET, 1))
    assert queue.take(0) == []
    now = uptime()
    monkeypatch.setattr(time, "clock_gettime", lambda _clock: now + 61)
    after_success = overdue(NOISY, 1, 2)
    queue.add(after_success)
    assert {lease.id for lease in queue.clear()} == {lease.id for lease in after_success}
    queue.add(overdue(QUIET, 1))
    assert [lease.key for lease in queue.take(9)] == [QUIET]


def test_shedding() -> None:
    """Shedding keeps only the earliest leases of the selected workspace queues, up to a given number.

    The selected queues have equal shares, and an unused share goes to the other queues.
    """
    queue = queue_of()
    queue.add(overdue(NOISY, *range(30)) + overdue(QUIET, 5) + overdue(3, *range(20)) + overdue(4, *range(9)))
    tripped = frozenset({NOISY, QUIET, 3})
    taken_first = queue.take(0)
    shed = queue.shed(tripped, 9)
    assert taken_first == []
    assert Counter(lease.key for lease in shed) == {NOISY: 26, 3: 16}
    assert [lease.due for lease in shed] == sorted(lease.due for lease in shed)
    assert queue.count(tripped) == 9
    assert queue.shed(tripped, 9) == []
    left = queue.take(99)
    assert Counter(lease.key for lease in left) == {NOISY: 4, QUIET: 1, 3: 4, 4: 9}
    for key in (NOISY, 3):
        assert max(one.due for one in left if one.key == key) < min(one.due for one in shed if one.key == key)


def test_a_shed_workspace_queue_is_empty() -> None:
    """If fewer leases are kept than there are workspace queues, some workspace queues become empty.

    If a workspace queue was emptied, it later accepts leases like a new one.
    """
    queue = queue_of()
    queue.add([lease for key in range(1, 6) for lease in overdue(key, 1)])
    queue.take(0)
    assert len(queue.shed(frozenset(range(1, 6)), 2)) == 3
    queue.add(overdue(1, 2) + overdue(2, 2))
    assert len(queue.take(99)) == 4
