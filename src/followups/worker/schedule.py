"""Beat's schedule and scheduler.

Beat uses Celery's own in-memory scheduler, with a heartbeat added. The scheduler keeps working if the host's clock is
set back.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from celery.beat import Scheduler as CelerysScheduler
from celery.schedules import crontab

from followups.settings import get_settings
from followups.telemetry.logs import get_logger
from followups.uptime import uptime
from followups.worker import liveness

if TYPE_CHECKING:
    from followups.settings import Settings

SENDING = timedelta(seconds=60)
"""Time limit for sending a tick; the broker may be silent for half of this time."""

LATE = timedelta(seconds=10)
"""How much longer than planned the scheduler may sleep."""

SET_BACK = 1.0
"""Smallest backward step, in seconds, at which a clock counts as set back. Clock synchronization normally changes the
clock by less than this.
"""

PRUNE_MINUTE = 17
"""Pruning starts in this minute of each hour; few cron jobs and sending hours begin then."""

log = get_logger(__name__)


def beat_schedule(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return beat's schedule: a tick each interval, and an hourly deletion of old rows."""
    return {
        "dispatch-due": {
            "task": "followups.dispatch_due",
            "schedule": settings.tick_interval,
        },
        # This schedule is a minute of the clock, not an interval. If beat were restarted often, an hourly interval
        # might never end, and old rows would be kept.
        "remove-old": {
            "task": "followups.remove_old",
            "schedule": crontab(minute=str(PRUNE_MINUTE)),
        },
    }


class Scheduler(CelerysScheduler):
    """Celery's in-memory scheduler, with a heartbeat report before each tick and before each sleep."""

    _booted_at: float | None = None
    """The time at which this host booted, according to the host's own clock.

    If the host's clock is set back, the computed boot time moves back too.
    """

    def tick(self, *arguments: Any, **named: Any) -> float:  # noqa: ANN401 - Celery's own
        """Send the due ticks; return the seconds until the next call."""
        self._report(SENDING, "has been sending one tick")
        self._follow_clock_change()
        pause: float = super().tick(*arguments, **named)
        self._report(timedelta(seconds=pause) + LATE, "has not looked at its schedule")
        return pause

    def _follow_clock_change(self) -> None:
        """Restart the schedule if the host's clock has been set back.

        Without the restart, Celery would send nothing until the clock had caught up.
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
        def log_retry(error: Exception, interval: float) -> None:
            log.warning("broker_unreachable", step="connect", error=type(error).__name__)
            self._report(timedelta(seconds=interval) + SENDING, "has not tried to reach the broker")

        return self.connection.ensure_connection(log_retry, self.app.conf.broker_connection_max_retries)

    def _report(self, within: timedelta, otherwise: str) -> None:
        if heart := liveness.start(get_settings().runtime_dir, "beat", f"beat@{socket.gethostname()}"):
            heart.report("schedule", within, otherwise)
