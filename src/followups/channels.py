"""Messaging windows: how long a channel lets a business write into a chat. Pure.

WhatsApp and Instagram allow free-form messages only within 24 hours of the customer's last message (Meta, "WhatsApp
Business Platform: customer service windows"; "Instagram Platform: messaging policy").
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum


class Channel(StrEnum):
    """Where a chat lives."""

    WIDGET = "widget"
    WAHA = "waha"
    WHATSAPP = "whatsapp"
    INSTAGRAM = "instagram"
    API = "api"
    MATRIX = "matrix"


WINDOW = timedelta(hours=24)
"""How long after the chat's last user message sending is allowed, on channels with a window."""

WINDOWED_CHANNELS = frozenset({Channel.WHATSAPP, Channel.INSTAGRAM})


def is_open(channel: Channel, last_user_message_at: datetime | None, at: datetime) -> bool:
    """Return whether a message may be sent into the chat at ``at``.

    On a channel with a window, a chat whose user never wrote is closed.
    """
    if channel not in WINDOWED_CHANNELS:
        return True
    return last_user_message_at is not None and at < last_user_message_at + WINDOW
