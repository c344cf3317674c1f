"""Live updates of open pages: server-sent events that report only that something has changed.

After an event, the page requests the changed regions again. Permissions are checked as for any other request. Each
process runs one query per second for all of its viewers together. If no viewer is connected, no query runs.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from followups.store import changes
from followups.telemetry.logs import get_logger
from followups.waits import wait

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from uuid import UUID

    from sqlalchemy import Engine

EVERY = 1.0
"""Seconds between two queries of the database."""

STEP = 0.25
"""Seconds between two checks of whether the process is stopping. Streams must close within a second."""

CHECKED_EVERY = 15.0
"""Seconds between two checks that a stream's session is still valid.

With each check, a keep-alive is sent over the stream.
"""

BY_SESSION, BY_WORKSPACE, ALL = 6, 100, 500
"""Maximum number of open streams per session, per workspace, and in this process."""

log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class Stream:
    """The event stream of one open page."""

    session_id: UUID
    workspace_id: UUID | None
    follow_up_id: UUID | None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def topics(self) -> tuple[tuple[str, UUID | None], ...]:
        """The page's topics: its workspaces and, if the page shows a single follow-up, that follow-up."""
        own = (("workspace", self.workspace_id),)
        return (*own, ("follow_up", self.follow_up_id)) if self.follow_up_id else own


class Live:
    """The open event streams of this process. Every method except `end` must run in the same event loop."""

    def __init__(
        self, engine: Engine, in_thread: Callable[[Callable[[], changes.TopicValues]], Awaitable[changes.TopicValues]]
    ) -> None:
        """Store the engine and ``in_thread``, a function that runs another function in a console thread."""
        self._engine = engine
        self._in_thread = in_thread
        self._streams: set[Stream] = set()
        self._looking: asyncio.Task[None] | None = None
        self._ending = False

    def end(self) -> None:
        """End all streams within a second, and refuse new ones. This function may be called from a signal handler."""
        self._ending = True

    def has_room(self, session_id: UUID, workspace_id: UUID | None) -> bool:
        """Return whether a session may open another stream."""
        mine = sum(each.session_id == session_id for each in self._streams)
        ours = sum(each.workspace_id == workspace_id for each in self._streams)
        return not self._ending and mine < BY_SESSION and ours < BY_WORKSPACE and len(self._streams) < ALL

    async def events(self, stream: Stream, still_valid: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
        """Yield the stream's bytes until the client disconnects, the session ends, or the process stops."""
        self._streams.add(stream)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._check())
        try:
            yield b"retry: 3000\nevent: open\ndata: 1\n\n"
            checked = time.monotonic()
            while not self._ending:
                await wait(stream.changed, STEP)
                if stream.changed.is_set():
                    stream.changed.clear()
                    yield b"event: change\ndata: 1\n\n"
                if time.monotonic() - checked > CHECKED_EVERY:
                    if not await still_valid():
                        yield b"event: signed-out\ndata: 1\n\n"
                        return
                    checked = time.monotonic()
                    yield b": alive\n\n"
        finally:
            self._streams.discard(stream)

    async def _check(self) -> None:
        """Query the database while streams are open, and notify each stream whose topics have changed."""
        before: changes.TopicValues = {}
        while self._streams and not self._ending:
            topics = {topic for stream in self._streams for topic in stream.topics}
            try:
                now = await self._in_thread(lambda wanted=topics: changes.read_values(self._engine, wanted))  # type: ignore[misc] # mypy: a lambda's default
            except SQLAlchemyError as error:
                log.warning("console_look_failed", error=type(error).__name__)
                now = before
            for stream in self._streams:
                # The first value of a topic counts as a change, because the page may have been rendered earlier.
                if any(before.get(topic) != now.get(topic) for topic in stream.topics):
                    stream.changed.set()
            before = now
            await asyncio.sleep(EVERY)
