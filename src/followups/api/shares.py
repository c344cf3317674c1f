"""What one workspace has at the database at once, so that the others find a connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from followups.errors import TooManyRequestsError

if TYPE_CHECKING:
    from uuid import UUID

SHARE = 6
"""Most database connections that one workspace has at once: the pool has 8."""

WAITING_SHARE = 128
"""Most requests of one workspace served or waiting at once: half of all."""

STRANGERS_SHARE = 2
"""Most database connections on which keys are looked up that this process does not know."""

TOO_MANY_WAIT = "Too many requests of this workspace are waiting; try again shortly."
TOO_MANY_STRANGERS = "Too many requests with keys that are not known yet are waiting; try again shortly."


class Shares:
    """The turns of each workspace: `SHARE` of its requests are served at once, and up to `WAITING_SHARE` wait."""

    def __init__(self) -> None:
        """Start without any."""
        self.strangers = Turns(STRANGERS_SHARE, TOO_MANY_STRANGERS)
        self._turns: WeakValueDictionary[UUID, Turns] = WeakValueDictionary()

    def of(self, workspace_id: UUID) -> Turns:
        """Return the workspace's turns, to be entered."""
        turns = self._turns.get(workspace_id)
        if turns is None:
            turns = self._turns[workspace_id] = Turns()
        return turns


class Turns:
    """The requests of one workspace, or of strangers, as a context manager for each of them."""

    def __init__(self, share: int = SHARE, refusal: str = TOO_MANY_WAIT) -> None:
        """Store the number of simultaneous turns, and the error message if too many requests wait."""
        self._semaphore = asyncio.Semaphore(share)
        self._refusal = refusal
        self._inside = 0

    async def __aenter__(self) -> None:
        """Wait for a turn. Raises `TooManyRequestsError` if too many wait already."""
        if self._inside >= WAITING_SHARE:
            raise TooManyRequestsError(self._refusal)
        self._inside += 1
        try:
            await self._semaphore.acquire()
        except BaseException:
            self._inside -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        """Give the turn to the next request."""
        self._inside -= 1
        self._semaphore.release()
