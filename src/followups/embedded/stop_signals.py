"""Stop signals (Ctrl-C, SIGTERM, a closed terminal) are recorded at once and handled between steps.

An exception in the signal handler could lose a process that has started but is not recorded yet. The handler therefore
only records the first signal. `StopSignals.check` then raises KeyboardInterrupt. A second signal before the next
`StopSignals.check` raises KeyboardInterrupt immediately. If processes remain, the watchdog of `followups.embedded`
stops them.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Records signals inside a ``with`` block. `StopSignals` must be used from the main thread."""

    def __init__(self) -> None:
        """Create the recorder without installing signal handlers."""
        self._wanted = False
        self._quiet = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Install the signal handlers."""
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() returned

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop signal has arrived."""
        if self._wanted:
            raise KeyboardInterrupt

    def quieten(self) -> None:
        """Ignore stop signals from now on, so that the shutdown is not interrupted."""
        self._quiet = True

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._wanted and not self._quiet:
            raise KeyboardInterrupt
        self._wanted = True
