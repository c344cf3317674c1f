"""Beat's scheduler: Celery's own, in memory, which shows that it goes on."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from celery.beat import Scheduler as CelerysScheduler

from followups import liveness
from followups.settings import get_settings
from followups.telemetry.logs import get_logger

SENDING = timedelta(seconds=60)
"""For one tick: a publish to a broker that is silent altogether is given up after half of it."""

LATE = timedelta(seconds=10)
"""How much later than planned the scheduler may come back from its sleep."""

log = get_logger(__name__)


class Scheduler(CelerysScheduler):
    """Signs before it sends a tick, and when it goes to sleep."""

    def tick(self, *arguments: Any, **named: Any) -> float:  # noqa: ANN401 - Celery's own
        """Send what is due; return in how many seconds to come back."""
        self._sign(SENDING, "has been sending one tick")
        pause: float = super().tick(*arguments, **named)
        self._sign(timedelta(seconds=pause) + LATE, "has not looked at its schedule")
        return pause

    def close(self) -> None:
        """Let go of the broker, and of life."""
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
