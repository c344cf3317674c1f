"""Tests of the retry policy: the delays, and which attempt is the last."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.retry_policy import MAX_RETRY_AFTER, MIN_RETRY_AFTER, SPREAD, RetryPolicy, clamp_retry_after, spread

ZERO = timedelta(0)
HOUR = timedelta(hours=1)

durations = st.timedeltas(timedelta(milliseconds=1), timedelta(days=30))
policies = st.builds(
    RetryPolicy,
    base=durations,
    factor=st.floats(1.0, 100.0),
    cap=durations,
    max_attempts=st.integers(1, 1000),
)
attempts = st.integers(1, 1000)
fractions = st.floats(0.0, 1.0, exclude_max=True)


@given(policies, attempts, fractions)
def test_the_delay_is_between_zero_and_the_ceiling(policy: RetryPolicy, attempt: int, fraction: float) -> None:
    """With any jitter, the delay is at least zero and at most the attempt's ceiling."""
    assert ZERO <= policy.jittered(attempt, lambda: fraction) <= policy.ceiling(attempt) <= policy.cap


@given(policies, st.integers(1, 999))
def test_the_ceiling_never_shrinks(policy: RetryPolicy, attempt: int) -> None:
    """The ceiling of the delay never decreases from one attempt to the next."""
    assert policy.ceiling(attempt) <= policy.ceiling(attempt + 1)


@given(policies, attempts)
def test_the_last_attempt_has_no_next(policy: RetryPolicy, attempt: int) -> None:
    """A failed attempt is followed by another one until no attempts are left."""
    assert (policy.next_delay(attempt) is None) == (attempt >= policy.max_attempts)


def test_the_ceiling_grows_by_the_factor_up_to_the_cap() -> None:
    """The ceiling is multiplied by the factor after each attempt, up to the cap."""
    policy = RetryPolicy(timedelta(seconds=5), 2.0, HOUR, max_attempts=1000)
    assert [policy.ceiling(attempt).total_seconds() for attempt in (1, 2, 3, 10, 11, 12)] == [
        5,
        10,
        20,
        2560,
        3600,
        3600,
    ]
    assert policy.ceiling(1000) == HOUR


def test_slow_growth_continues() -> None:
    """If the retry factor is close to 1, the delay's ceiling grows over many attempts."""
    policy = RetryPolicy(timedelta(seconds=1), 1.01, HOUR, max_attempts=1000)
    assert policy.ceiling(201).total_seconds() == pytest.approx(1.01**200, abs=1e-5)


def test_the_jitter_is_full() -> None:
    """Each delay is drawn at random between zero and an upper limit."""
    policy = RetryPolicy(timedelta(seconds=8), 2.0, HOUR, max_attempts=8)
    assert policy.next_delay(2, lambda: 0.0) == ZERO
    assert policy.next_delay(2, lambda: 0.25) == timedelta(seconds=4)
    assert len({policy.next_delay(2) for _ in range(50)}) > 1


@given(st.timedeltas(timedelta(days=-400), timedelta(days=400)))
def test_a_requested_delay_is_clamped(wished: timedelta) -> None:
    """A delay requested by the transport is clamped to between one second and one day."""
    kept = clamp_retry_after(wished)
    assert MIN_RETRY_AFTER <= kept <= MAX_RETRY_AFTER
    assert kept == wished or not MIN_RETRY_AFTER <= wished <= MAX_RETRY_AFTER


@given(st.timedeltas(MIN_RETRY_AFTER, MAX_RETRY_AFTER), st.floats(0, 1, exclude_max=True))
def test_a_requested_delay_is_spread(wished: timedelta, fraction: float) -> None:
    """A delay requested by the receiver is extended by at most a tenth, and never exceeds a day."""
    waited = spread(wished, lambda: fraction)
    assert wished <= waited <= min(wished * (1 + SPREAD), MAX_RETRY_AFTER)
