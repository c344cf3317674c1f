"""The queue of ticks while no worker reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import redis

if TYPE_CHECKING:
    from followups.settings import Settings

FLOOD = "from followups import worker; [worker.ask_for_tick() for _ in range(worker.UNREAD + 20)]; print(worker.UNREAD)"


def test_bounded(settings: Settings) -> None:
    """However many ticks are requested, the queue is bounded and cannot fill the broker."""
    ran = subprocess.run(
        [sys.executable, "-c", FLOOD],
        env=os.environ | settings.environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    with redis.Redis.from_url(settings.broker_url.get_secret_value()) as client:
        assert client.llen(f"{settings.broker_prefix}dispatch") == int(ran.stdout)
