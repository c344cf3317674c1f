"""Tests of messaging windows: the periods in which a channel lets a business write."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.channels import WINDOW, WINDOWED_CHANNELS, Channel, is_open

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def test_the_channels_are_the_contract_s() -> None:
    """The documented channels exist; WhatsApp and Instagram have a window of 24 hours."""
    assert {*Channel} == {"widget", "waha", "whatsapp", "instagram", "api", "matrix"}
    assert {"whatsapp", "instagram"} == WINDOWED_CHANNELS
    assert timedelta(hours=24) == WINDOW


@pytest.mark.parametrize("channel", sorted(WINDOWED_CHANNELS))
def test_the_window_ends_24_hours_after_the_user_s_last_message(channel: Channel) -> None:
    """A message may be sent only if less than 24 hours have passed since the user's last message."""
    assert is_open(channel, NOON, NOON)
    assert is_open(channel, NOON, NOON + WINDOW - MICROSECOND)
    assert not is_open(channel, NOON, NOON + WINDOW)


@pytest.mark.parametrize("channel", sorted(WINDOWED_CHANNELS))
def test_without_a_user_s_message_there_is_no_window(channel: Channel) -> None:
    """A channel with a messaging window sends nothing until the user has written."""
    assert not is_open(channel, None, NOON)


@given(
    channel=st.sampled_from(sorted(set(Channel) - WINDOWED_CHANNELS)),
    last=st.none() | st.datetimes(timezones=st.just(UTC)),
    at=st.datetimes(timezones=st.just(UTC)),
)
def test_other_channels_are_always_open(channel: Channel, last: datetime | None, at: datetime) -> None:
    """A channel without a window accepts a message at any time."""
    assert is_open(channel, last, at)
