"""The time limit for calls of the transport.

All calls share one timer, because a separate timer for each call would take 4 us.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from datetime import timedelta

    Task = asyncio.Task[Any]


class CallTimeout:
    """Cancels every task whose call takes longer than the limit. An instance belongs to one event loop."""

    def __init__(self, limit: timedelta) -> None:
        """Set the longest duration of a call to ``limit``."""
        self.seconds = limit.total_seconds()
        self._ends: dict[Task, float] = {}
        """The time by which each task's call must have ended, by the event loop's clock. All calls have the same time
        limit, so the call that began first also ends first.
        """
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> Task:
        """Start the time limit of the current task's call, and return the task."""
        task = cast("Task", asyncio.current_task())
        loop = asyncio.get_running_loop()
        end = self._ends[task] = loop.time() + self.seconds
        if self._timer is None:
            self._timer = loop.call_at(end, self._expire)
        return task

    def end(self, task: Task) -> bool:
        """End the time limit of a task's call, and return whether the call exceeded it."""
        if self._ends.pop(task, None) is not None:
            return False
        task.uncancel()
        return True

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._ends:
            task, end = next(iter(self._ends.items()))
            if end > loop.time():
                self._timer = loop.call_at(end, self._expire)
                return
            del self._ends[task]
            task.cancel()
