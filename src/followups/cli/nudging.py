"""A hint to the dispatcher, after a command that made something due soon. Never of consequence."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import datetime, timedelta

from followups.settings import get_settings

PATIENCE = timedelta(seconds=5)
"""How long a command waits for its hint to be sent; without it, the next tick does the same a little later."""


def nudge_if_soon(due: datetime, now: datetime) -> None:
    """Ask for a tick when ``due`` comes before the next one. Fails silently: beat's own ticks don't."""
    if due - now <= get_settings().tick_interval:
        ask_for_tick()


def ask_for_tick() -> None:
    """Send the hint, within `PATIENCE`."""
    from followups import worker  # noqa: PLC0415 - loads Celery, which other commands don't need

    def send() -> None:
        with suppress(Exception):  # the change is committed; beat's next tick finds it
            worker.ask_for_tick()

    # In a thread: a client of a broker that is away may wait longer than anybody at a terminal wants to.
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sender.join(PATIENCE.total_seconds())
