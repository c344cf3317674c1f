"""Tests of the tick queue when no worker consumes it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import redis

if TYPE_CHECKING:
    from followups.settings import Settings

FLOOD = """
from followups.worker import celery_app
for _ in range(celery_app.UNREAD + 20):
    celery_app.ask_for_tick()
print(celery_app.UNREAD)
"""
LOST = """
from followups.worker import celery_app
with celery_app.app.producer_pool.acquire() as producer:
    producer.publish("", routing_key="dispatch", declare=[])
    producer.channel.close()
    celery_app.dispatch_due.apply_async(producer=producer)
"""


def test_a_lost_connection(settings: Settings) -> None:
    """Beat sends a tick even if the channel of its long-lived producer has been closed."""
    environment = os.environ | settings.environment()
    ran = subprocess.run(
        [sys.executable, "-c", LOST], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    with redis.Redis.from_url(settings.broker_url.get_secret_value()) as client:
        assert client.llen(f"{settings.broker_prefix}dispatch") == 2


def test_bounded(settings: Settings) -> None:
    """The length of the tick queue is limited, however many ticks are requested."""
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
