"""Ctrl-C, SIGTERM and a closed terminal: each ends the block, once; then nothing disturbs the stopping."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Within the block, the first of the signals raises KeyboardInterrupt. Used from the main thread."""

    def __init__(self) -> None:
        """Change nothing yet."""
        self._quiet = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Take over the signals."""
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() returned

    def quieten(self) -> None:
        """From now on ignore them: what is being stopped is stopped whole."""
        self._quiet = True

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self._quiet:
            self._quiet = True
            raise KeyboardInterrupt
