"""Integration tests of beat's scheduler on a host whose clock changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import time_machine
from celery import Celery

from followups.worker import liveness
from followups.worker.schedule import Scheduler
from stack import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from followups.settings import Settings


@pytest.mark.parametrize("step", [-timedelta(hours=1), timedelta(hours=1)])
def test_clock_is_set(step: timedelta, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host's clock is set back or forward, beat still ticks at the same interval."""
    environment = settings.environment() | {"FOLLOWUPS_RUNTIME_DIR": str(tmp_path)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    app = Celery("test", broker="memory://", set_as_current=False)
    app.conf.beat_schedule = {"tick": {"task": "tick", "schedule": 0.01}}
    scheduler = Scheduler(app=app)
    with app.connection_for_read() as connection, connection.SimpleQueue("celery") as queue:

        def ticked() -> bool:
            scheduler.tick()
            return queue.qsize() > 0

        wait_until(ticked)
        with time_machine.travel(datetime.now(UTC) + step, tick=True):
            queue.clear()
            wait_until(ticked)
    scheduler.close()
    liveness.stop()
    app.close()
