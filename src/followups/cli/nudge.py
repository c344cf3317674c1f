"""Asks for a tick after a command that made something due soon. Nothing depends on it."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import datetime, timedelta

from followups.settings import get_settings

PATIENCE = timedelta(seconds=5)
"""How long a command waits for the broker; without this tick, the next one does the same a little later."""


def nudge_if_soon(due: datetime, now: datetime) -> None:
    """Ask for a tick if ``due`` comes before the next regular one. Errors are ignored, since beat's ticks go on."""
    if due - now <= get_settings().tick_interval:
        ask_for_tick()


def ask_for_tick() -> None:
    """Send a tick, within `PATIENCE`."""
    from followups.worker import celery_app  # noqa: PLC0415 - loads Celery, which other commands don't need

    def send() -> None:
        with suppress(Exception):  # the change is committed; the next regular tick finds it
            celery_app.ask_for_tick()

    # In a thread, since a client of an unreachable broker may block longer than an operator would wait.
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sender.join(PATIENCE.total_seconds())
