"""Slots: how many calls there may be at once, and how many may begin for those that come free meanwhile.

Begin gathers, and takes a while. If it asked only for slots that are free, each would stand empty as long: a third of
its time where calls take 50 ms. So more begin, as many as will have come free by the time that the batch after this one
is there, and wait for their slot: some milliseconds as a rule, and one call at worst.
"""

from __future__ import annotations

import asyncio
import time
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

LATELY = 1 / 100
"""How much one more counts in how long it is from the end of one call to that of the next."""


class Slots:
    """The slots of one event loop. Use as an asynchronous context for the time of a call."""

    def __init__(self, number: int, *, ahead: bool) -> None:
        """Without ``ahead`` nobody begins for a slot that is not free; with it, one for each slot waits at most."""
        self._most_ahead = number if ahead else 0
        self._left = number
        self._ahead = 0
        self._last_end: float | None = None
        self._between_ends = inf
        self._turns = asyncio.Semaphore(number)

    @property
    def room(self) -> int:
        """How many more may begin."""
        return max(self._left + self._ahead, 0)

    def take(self, number: int) -> None:
        """Note that so many begin."""
        self._left -= number

    def leave(self, number: int = 1) -> None:
        """Note that so many did not begin, or are through with their call."""
        self._left += number

    def note_end(self, at: float) -> None:
        """Note when a call ended (monotonic seconds).

        Many that hung and end together were far from the one before: what comes after them is not taken for quick.
        """
        if self._last_end is not None:
            since = at - self._last_end
            known = self._between_ends < inf
            self._between_ends = self._between_ends + (since - self._between_ends) * LATELY if known else since
        self._last_end = at

    def note_begin(self, seconds: float) -> None:
        """Note how long it takes from one batch to the next, so that the next one is large enough."""
        batches = 2  # the one that is on its way, and those that have begun before it
        self._ahead = int(min(batches * seconds / self._between_ends if self._between_ends else inf, self._most_ahead))

    async def __aenter__(self) -> None:
        """Wait for a slot, in the order of asking."""
        await self._turns.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the next one in."""
        self._turns.release()
        self.note_end(time.monotonic())
