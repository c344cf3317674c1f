"""Waiting with a time limit."""

from __future__ import annotations

import asyncio
from contextlib import suppress


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Wait until ``event`` is set, but at most ``seconds``.

    Python 3.11's `asyncio.wait_for` would ignore a cancellation that arrives just after the event was set.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
