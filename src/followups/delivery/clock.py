"""A worker's estimate of the database's clock; no decision depends on a host's clock."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

SAMPLES = 12
"""Number of clock samples that are kept. While the kept samples are collected, the clocks drift apart by less than a
millisecond.
"""

_NOW = text("SELECT clock_timestamp()")


class DatabaseClock:
    """The offset between this machine's uptime and the database's clock.

    The time computed with this offset is never ahead of the database's clock.

    In a sample, ``read`` is the database's clock, read at a moment between ``asked`` and ``answered``. The estimate
    assumes that ``read`` is the time at ``answered``. The estimate is wrong by at most the time that the answer took to
    arrive. The estimated time is never ahead of the database's clock, so no follow-up is sent early. The quicker the
    answer, the smaller the error and the larger the offset. Therefore, the largest of the recent offsets is used.
    """

    def __init__(self, seconds: Callable[[], float] = uptime) -> None:
        """Start without samples; ``seconds`` must be a clock that is never adjusted."""
        self._seconds = seconds
        self._samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        self._offset: float | None = None

    def observe(self, read: datetime, asked: float, answered: float) -> None:
        """Record a sample: the database's time, and the uptime before and after the query."""
        seconds = read.timestamp()
        lowest, highest = seconds - answered, seconds - asked
        if self._offset is not None and self._offset > highest:
            self._samples.clear()  # the database's clock was set back
        self._samples.append((lowest, highest))
        self._offset = max(low for low, _ in self._samples)

    def ask(self, engine: Engine, times: int = 1) -> None:
        """Read the database's clock ``times`` times, and record each reading as a sample."""
        with engine.connect() as connection:
            for _ in range(times):
                asked = self._seconds()
                read = connection.execute(_NOW).scalar_one()
                self.observe(read, asked, self._seconds())

    @property
    def known(self) -> bool:
        """Whether any sample was recorded."""
        return self._offset is not None

    def now(self) -> datetime:
        """Return the database's time. Raises RuntimeError if no sample has been recorded yet."""
        return datetime.fromtimestamp(self._seconds() + self._known_offset(), UTC)

    def until(self, moment: datetime) -> float:
        """Return the seconds until ``moment``; the result is negative if ``moment`` has passed."""
        return moment.timestamp() - (self._seconds() + self._known_offset())

    def _known_offset(self) -> float:
        if self._offset is None:
            message = "the database's clock has not been asked yet"
            raise RuntimeError(message)
        return self._offset
