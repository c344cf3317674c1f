"""Tests that a backlog is claimed whenever half of the window has become free."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.delivery.claim import size_of_claim
from followups.delivery.claim_interval import LONGEST, SHORTEST, ClaimInterval, until_half_is_free


@pytest.mark.parametrize(
    ("taken", "seconds", "window", "expected"),
    [
        (2350, 0.5, 5000, LONGEST),  # 4,700 per second: 0.53 s
        # 10,000 per second after a pause that was too short; the next pause is at most twice as long
        (1000, 0.1, 5000, 0.2),
        (4000, 0.5, 5000, 0.3125),  # 8,000 a second
        (2500, 0.03, 5000, SHORTEST),  # immediately after a claim that filled the window
        (100, 0.5, 100, SHORTEST),  # all places in the window became free
        (20, 0.1, 100, 0.2),
        (1, 0.05, 5000, 0.1),
        (0, 0.2, 5000, 0.4),
        (0, 60.0, 5000, LONGEST),
        (0, 0.0, 5000, SHORTEST),
    ],
)
def test_until_half_is_free(taken: int, seconds: float, window: int, expected: float) -> None:
    """The next claim is due when half of the window is free; the interval has a minimum and a maximum.

    Each interval is at most twice as long as the previous one.
    """
    assert until_half_is_free(taken, seconds, window) == pytest.approx(expected)


@given(st.floats(1, 200_000), st.integers(100, 1_000_000), st.floats(SHORTEST, LONGEST))
def test_the_interval_converges(rate: float, window: int, pause: float) -> None:
    """At a steady rate, the claim interval converges to the time in which half the window is sent.

    The final interval does not depend on the first interval.
    """
    for _ in range(10):
        pause = until_half_is_free(min(window, int(rate * pause)), pause, window)
    expected = min(max(SHORTEST, window / (2 * rate)), LONGEST)
    assert expected * 0.99 <= pause <= expected * 1.25


@pytest.mark.parametrize(("window", "expected"), [(1, 1), (100, 100), (1500, 1000), (5000, 2500), (100_000, 10_000)])
def test_size_of_claim(window: int, expected: int) -> None:
    """A claim usually takes half of the in-flight window.

    If the window is small, a claim takes more than half of it, or all. In a large window, one claim takes at most
    `LARGEST_CLAIM` follow-ups.
    """
    assert size_of_claim(window) == expected


TICK = 1.0
CLAIM = 0.03
"""The duration of a claim in seconds."""


def sent(dispatchers: int, rate: int, seconds: int, window: int = 5000) -> tuple[int, int]:
    """Send a backlog at ``rate`` per second; count the sent follow-ups and the claims.

    The simulated dispatchers take turns.
    """
    paces = [ClaimInterval(window) for _ in range(dispatchers)]
    busy_until, ends = [0.0] * dispatchers, [0.0] * dispatchers
    in_flight = total = claims = 0
    for millisecond in range(seconds * 1000):
        now = millisecond / 1000
        gone = min(in_flight, rate // 1000)
        in_flight, total = in_flight - gone, total + gone
        if now % TICK == 0:
            one = int(now / TICK) % dispatchers
            ends[one] = now + TICK
            paces[one].begin()
        for one, pace in enumerate(paces):
            if now < ends[one] and now >= max(pace.next, busy_until[one]):
                room = window - in_flight
                taken = min(room, size_of_claim(window))
                in_flight, busy_until[one], claims = in_flight + taken, now + CLAIM, claims + 1
                pace.record_claim(taken, now, more=True, cut_short=taken < room)
    return total, claims


@pytest.mark.parametrize("dispatchers", [1, 2, 4])
@pytest.mark.parametrize("rate", [2000, 10_000, 30_000])
def test_the_window_is_refilled_in_time(dispatchers: int, rate: int) -> None:
    """However many dispatchers share the ticks, they refill the in-flight window before it is empty."""
    total, _ = sent(dispatchers, rate, seconds=20)
    assert total >= 0.98 * rate * 20


@pytest.mark.parametrize("dispatchers", [1, 2, 4])
def test_few_claims(dispatchers: int) -> None:
    """A tick starts with large claims. Each claim reads all follow-ups in flight, so fewer claims cost less."""
    _, claims = sent(dispatchers, rate=5000, seconds=20)
    assert claims <= 20 * 3
