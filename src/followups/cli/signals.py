"""Ctrl-C, SIGTERM and a closed terminal: noted when they come, heeded between two steps.

An exception out of a signal handler could come between the start of a process and its being written down;
so the first signal only leaves a note, which `StopSignals.check` turns into KeyboardInterrupt. Who sends a
second one before that does not want to wait: it raises at once, and the watchdog of `followups.embedded`
stops what is left.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Within the block the signals are noted. Used from the main thread."""

    def __init__(self) -> None:
        """Change nothing yet."""
        self._wanted = False
        self._quiet = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Take over the signals."""
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() returned

    def check(self) -> None:
        """Raise KeyboardInterrupt when a signal has come."""
        if self._wanted:
            raise KeyboardInterrupt

    def quieten(self) -> None:
        """From now on ignore them: what is being stopped is stopped whole."""
        self._quiet = True

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._wanted and not self._quiet:
            raise KeyboardInterrupt
        self._wanted = True
