"""Limits on one workspace's database connections, so that other workspaces always find one free."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from followups.errors import TooManyRequestsError

if TYPE_CHECKING:
    from uuid import UUID

SHARE = 6
"""Maximum number of database connections used by one workspace at a time, out of 8 in the pool."""

WAITING_SHARE = 128
"""Maximum number of one workspace's requests running or waiting: half of the process's limit."""

STRANGERS_SHARE = 2
"""Maximum number of database connections for looking up API keys unknown to this process."""

TOO_MANY_WAIT = "Too many requests of this workspace are waiting; try again shortly."
TOO_MANY_STRANGERS = "Too many requests with keys that are not known yet are waiting; try again shortly."


class Shares:
    """The limit of each workspace: `SHARE` requests run at a time, and `WAITING_SHARE` run or wait."""

    def __init__(self) -> None:
        """Start with no workspaces."""
        self.strangers = Turns(STRANGERS_SHARE, TOO_MANY_STRANGERS)
        self._turns: WeakValueDictionary[UUID, Turns] = WeakValueDictionary()

    def of(self, workspace_id: UUID) -> Turns:
        """Return the workspace's limit, a context manager for each of its requests."""
        turns = self._turns.get(workspace_id)
        if turns is None:
            turns = self._turns[workspace_id] = Turns()
        return turns


class Turns:
    """A limit on simultaneous requests, entered by each request of a workspace or with an unknown API key."""

    def __init__(self, share: int = SHARE, refusal: str = TOO_MANY_WAIT) -> None:
        """Store the number of simultaneous requests, and the error message for when too many wait."""
        self._semaphore = asyncio.Semaphore(share)
        self._refusal = refusal
        self._inside = 0

    async def __aenter__(self) -> None:
        """Wait until another request may run. Raises `TooManyRequestsError` if too many are already waiting."""
        if self._inside >= WAITING_SHARE:
            raise TooManyRequestsError(self._refusal)
        self._inside += 1
        try:
            await self._semaphore.acquire()
        except BaseException:
            self._inside -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        """Let the next waiting request run."""
        self._inside -= 1
        self._semaphore.release()
