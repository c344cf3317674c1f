"""Messaging windows: how long a channel lets a business write into a chat. Pure functions.

WhatsApp and Instagram allow free-form messages only within 24 hours of the customer's last message (Meta, "WhatsApp
Business Platform: customer service windows"; "Instagram Platform: messaging policy").
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum


class Channel(StrEnum):
    """The messaging channel of a chat."""

    WIDGET = "widget"
    WAHA = "waha"
    WHATSAPP = "whatsapp"
    INSTAGRAM = "instagram"
    API = "api"
    MATRIX = "matrix"


WINDOW = timedelta(hours=24)
"""Length of the messaging window after the user's last message, for each channel that has one."""

WINDOWED_CHANNELS = frozenset({Channel.WHATSAPP, Channel.INSTAGRAM})


NEVER_OPEN = datetime.min.replace(tzinfo=UTC)
"""The end of the messaging window of a chat in which the user has never written."""


def window_closes_at(channel: str, last_user_message_at: datetime | None) -> datetime | None:
    """Return when the chat's messaging window closes, or None if its channel has no messaging window."""
    if channel not in WINDOWED_CHANNELS:
        return None
    return last_user_message_at + WINDOW if last_user_message_at else NEVER_OPEN


def is_open(channel: Channel, last_user_message_at: datetime | None, at: datetime) -> bool:
    """Return whether a message may be sent into the chat at the time ``at``.

    On a channel with a messaging window, no message may be sent into a chat in which the user has never written.
    """
    closes = window_closes_at(channel, last_user_message_at)
    return closes is None or at < closes
