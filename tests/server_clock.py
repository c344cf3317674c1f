"""A settable clock for Redis scripts: they read the time from a key, not from the server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import uuid4

import redis

from followups.flow_control import script

if TYPE_CHECKING:
    import pytest

TIME = "redis.call('TIME')"
MICROSECOND = 1_000_000


class ServerClock:
    """The time that Lua scripts see on the Redis server; only `go_on` changes this time."""

    def __init__(self, broker_url: str, monkeypatch: pytest.MonkeyPatch, *modules: object) -> None:
        """Make all scripts that the given modules load use this clock."""
        self._client = redis.Redis.from_url(broker_url)
        self._key = f"clock-{uuid4().hex}"
        self._now = int(time.time() * MICROSECOND)
        self.go_on(0)
        for module in modules:
            monkeypatch.setattr(module, "script", self._script)

    def go_on(self, seconds: float) -> None:
        """Advance the clock by ``seconds``; a negative or very large number simulates a change of the clock."""
        self._now += int(seconds * MICROSECOND)
        with self._client.pipeline() as pipeline:
            pipeline.delete(self._key).rpush(self._key, *divmod(self._now, MICROSECOND)).execute()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _script(self, name: str) -> str:
        text = script(name)
        assert TIME in text
        return text.replace(TIME, f"redis.call('LRANGE', '{self._key}', 0, -1)")
