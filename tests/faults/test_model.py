"""Tests that try every order of events, and every possible crash, in a small protocol model."""

from __future__ import annotations

import sys

import pytest

from faults.model.explore import explore, shown
from faults.model.world import Protocol


def test_complete_protocol() -> None:
    """With all guards in place, no order of events breaks a guarantee, and every follow-up can end."""
    for deduplicates in (True, False):
        for creates_late in (True, False):
            completely(Protocol(deduplicates=deduplicates, creates_late=creates_late))


@pytest.mark.faults_long
@pytest.mark.parametrize("deduplicates", [True, False])
def test_complete_protocol_with_three_claims(deduplicates: bool) -> None:  # noqa: FBT001 - a parameter of a test
    """Even if each follow-up is claimed three times, no order of events breaks a guarantee."""
    completely(Protocol(deduplicates=deduplicates, most_claims=3))


def completely(protocol: Protocol) -> None:
    """Explore the model, and check that no promise is broken."""
    found = explore(protocol)
    shown(found, protocol, sys.stdout.write)
    assert not found.broken
    assert found.worlds > 5_000
    assert found.endings > 100


@pytest.mark.parametrize(
    ("without", "deduplicates", "promise"),
    [
        ({"token at begin"}, True, "no stale writer's write is taken"),
        ({"token at settle"}, True, "no stale writer's write is taken"),
        ({"begun at begin"}, False, "nothing doubled"),
        ({"begun at cancel"}, True, "no lie"),
        ({"chat lock"}, True, "a reply stops what is not in flight"),
        ({"order at begin"}, True, "order within a chat"),
        # If two guards protect the same guarantee, both must be removed to break it.
        ({"pending at begin", "lease at begin"}, True, "nothing after its cancel"),
        ({"pending at settle", "begun at settle"}, True, "final states never change"),
    ],
    ids=lambda value: " and ".join(sorted(value)) if isinstance(value, set) else "",
)
def test_without_a_guard(without: set[str], deduplicates: bool, promise: str) -> None:  # noqa: FBT001 - as above
    """If a guard is removed, the promise that depends on the guard is broken."""
    protocol = Protocol(deduplicates=deduplicates, without=frozenset(without), creates_late="chat lock" in without)
    found = explore(protocol)
    shown(found, protocol, sys.stdout.write)
    assert found.broken.startswith(promise), found
