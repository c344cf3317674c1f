"""The pace of claims behind a backlog: half of the window at a time, at whatever rate it comes free."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.dispatch.claim import size_of_claim
from followups.dispatch.pace import LONGEST, SHORTEST, until_half_is_free


@pytest.mark.parametrize(
    ("taken", "seconds", "window", "expected"),
    [
        (2350, 0.5, 5000, LONGEST),  # 4,700 a second: 0.53 s
        (1000, 0.1, 5000, 0.2),  # 10,000 a second, after a pause that was too short: no more than twice as long
        (4000, 0.5, 5000, 0.3125),  # 8,000 a second
        (2500, 0.03, 5000, SHORTEST),  # right after one that was full
        (100, 0.5, 100, SHORTEST),  # all came free
        (20, 0.1, 100, 0.2),
        (1, 0.05, 5000, 0.1),
        (0, 0.2, 5000, 0.4),
        (0, 60.0, 5000, LONGEST),
        (0, 0.0, 5000, SHORTEST),
    ],
)
def test_until_half_is_free(taken: int, seconds: float, window: int, expected: float) -> None:
    """It is as long as half takes at that rate, within bounds, and grows no faster than twofold."""
    assert until_half_is_free(taken, seconds, window) == pytest.approx(expected)


@given(st.floats(1, 200_000), st.integers(100, 1_000_000), st.floats(SHORTEST, LONGEST))
def test_it_settles(rate: float, window: int, pause: float) -> None:
    """At a steady rate it comes to half of the window, from whatever pause it starts, within its bounds."""
    for _ in range(10):
        pause = until_half_is_free(min(window, int(rate * pause)), pause, window)
    expected = min(max(SHORTEST, window / (2 * rate)), LONGEST)
    assert expected * 0.99 <= pause <= expected * 1.25


@pytest.mark.parametrize(("window", "expected"), [(1, 1), (100, 100), (1500, 1000), (5000, 2500), (100_000, 10_000)])
def test_size_of_claim(window: int, expected: int) -> None:
    """A claim takes half of the window; of a small one as much as is worth it, of a large one what takes a moment."""
    assert size_of_claim(window) == expected
