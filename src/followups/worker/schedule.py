"""Beat's scheduler: Celery's own, in memory, with a heartbeat, and robust against a clock set back."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any

from celery.beat import Scheduler as CelerysScheduler

from followups.settings import get_settings
from followups.telemetry.logs import get_logger
from followups.uptime import uptime
from followups.worker import liveness

SENDING = timedelta(seconds=60)
"""Time for one tick: a publish to a silent broker is given up after half of it."""

LATE = timedelta(seconds=10)
"""How much later than planned the scheduler may return from its sleep."""

SET_BACK = 1.0
"""Minimum seconds by which a clock counts as set back; a smaller step is ordinary synchronization."""

log = get_logger(__name__)


class Scheduler(CelerysScheduler):
    """Records a sign in the heartbeat before it sends a tick and before it sleeps."""

    _booted_at: float | None = None
    """When this host booted, by its own clock.

    The value decreases if the clock was set back since the previous check.
    """

    def tick(self, *arguments: Any, **named: Any) -> float:  # noqa: ANN401 - Celery's own
        """Send what is due, and return the seconds until the next call."""
        self._sign(SENDING, "has been sending one tick")
        self._heed_the_clock()
        pause: float = super().tick(*arguments, **named)
        self._sign(timedelta(seconds=pause) + LATE, "has not looked at its schedule")
        return pause

    def _heed_the_clock(self) -> None:
        """Restart the schedule when the host's clock was set back.

        Celery would otherwise wait until the clock shows the old time again.
        """
        before, self._booted_at = self._booted_at, time.time() - uptime()
        if before is None or self._booted_at > before - SET_BACK:
            return
        log.warning("clock_set_back", seconds=round(before - self._booted_at, 1))
        for entry in self.schedule.values():
            entry.last_run_at = entry.default_now()
        self._heap = None

    def close(self) -> None:
        """Close the broker connection and end the heartbeat."""
        super().close()
        liveness.stop()

    def _ensure_connected(self) -> Any:  # noqa: ANN401 - Celery's own
        def told(error: Exception, interval: float) -> None:
            log.warning("broker_unreachable", step="connect", error=type(error).__name__)
            self._sign(timedelta(seconds=interval) + SENDING, "has not tried to reach the broker")

        return self.connection.ensure_connection(told, self.app.conf.broker_connection_max_retries)

    def _sign(self, within: timedelta, otherwise: str) -> None:
        if heart := liveness.start(get_settings().runtime_dir, "beat", f"beat@{socket.gethostname()}"):
            heart.sign("schedule", within, otherwise)
