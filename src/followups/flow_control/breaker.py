"""The breaker's shared state: one script records outcomes and returns how many attempts may begin.

If Redis is wiped, the breaker is closed and opens again with the next failures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from followups.delivery.breaker import CLOSED, Reading
from followups.flow_control import connect, script

if TYPE_CHECKING:
    import redis

    from followups.delivery.breaker import News
    from followups.settings import Settings

KEPT = 3600
"""Seconds after which an unused state is forgotten."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How soon, and how fast, a failed transport is tried again."""

    first_pause: float = 1.0
    longest_pause: float = 15.0
    """Longest pause before a probe, in seconds; each pause is twice the one before."""
    probes: int = 3
    """Attempts that may begin as a probe."""
    first_rate: float = 10.0
    """Begins a second, over all workers, after a successful probe; it doubles every second."""
    last_rate: float = 10_000.0
    """From this rate on the breaker is closed, some ten seconds later."""
    fails_again: int = 10
    """Different follow-ups failing in a row during recovery that open it again."""
    in_a_row: int = 5
    """Number of failed attempts in a row after which a workspace is held.

    At a hundred attempts a second, of which one in fifty fails, three in a row come every 21 minutes, four every 18
    hours, and five once in 37 days. Where one in ten fails, five come every 18 minutes. A higher number would cost
    every workspace more attempts while the transport is unreachable.
    """

    def arguments(self) -> tuple[float, ...]:
        """Return the script's arguments in its order; pauses are in milliseconds."""
        pauses = (self.first_pause * 1000, self.longest_pause * 1000)
        return (*pauses, self.probes, self.first_rate, self.last_rate, self.fails_again, KEPT)


class RedisBreaker:
    """The state of one transport; `followups.delivery.breaker.BreakerStore`. Used from one event loop."""

    def __init__(self, settings: Settings, transport: str, pace: Pace = Pace()) -> None:
        """Take the settings; connect to nothing yet."""
        self._redis = connect(settings)
        self._script = self._redis.register_script(script("breaker.lua"))
        name = _key(settings, transport)
        self._keys = [name, *(f"{name}:{part}" for part in ("failing", "runs", "held"))]
        self._threshold = settings.breaker_failures
        # A follow-up that is alone in its workspace must keep its last attempt.
        self._in_a_row = max(1, min(pace.in_a_row, settings.max_attempts - 1))
        self._pace = pace.arguments()

    async def report(self, news: News, wanted: int) -> Reading:
        """Report outcomes and request permits. Raises `redis.RedisError` or `OSError` if Redis is unreachable."""
        added = ([one.hex for one in news.failed], news.runs)
        arguments: list[float | str] = [
            self._threshold,
            wanted,
            int(news.succeeded),
            *self._pace,
            self._in_a_row,
            *map(json.dumps, added),
        ]
        state, permits, changed, held = await self._script(keys=self._keys, args=arguments)
        return Reading(state, int(permits), changed=bool(changed), held=frozenset(map(int, held)))

    async def close(self) -> None:
        """Close the connection."""
        await self._redis.aclose()


@dataclass(frozen=True, slots=True)
class Shown:
    """The state for display: its age in seconds, the failed probes, and the workspaces it holds."""

    state: str
    seconds: float
    probed: int
    held: frozenset[int] = frozenset()
    """The numbers of their workspaces (`followups.store.leases.lane_of`)."""


def read(client: redis.Redis, settings: Settings) -> Shown:
    """Return the breaker's state for the configured transport. Raises `redis.RedisError` if Redis is unreachable."""
    key = _key(settings, settings.transport)
    kept = cast("dict[str, str]", client.hgetall(key))
    fields: dict[str, Any] = {_text(name): _text(value) for name, value in kept.items()}
    if not fields:
        return Shown(CLOSED, 0.0, 0)
    since = float(fields.get("since", 0))
    seconds = (float(fields.get("clock", since)) - since) / 1000
    held = cast("set[str]", client.smembers(f"{key}:held"))
    return Shown(fields["name"], seconds, max(0, int(fields.get("tries", 1)) - 1), frozenset(map(int, held)))


def _key(settings: Settings, transport: str) -> str:
    return f"{settings.broker_prefix}breaker:{transport}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
