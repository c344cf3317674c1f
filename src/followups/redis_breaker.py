"""The breaker's shared state, in the broker's Redis: one script that adds outcomes, and says how many may begin.

It guards no promise. Redis wiped: the state is closed again, and opens anew when the next ones fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from followups.dispatch.breaker import CLOSED, Reading

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    import redis

    from followups.settings import Settings

TIMEOUT = 0.5
"""Seconds that Redis may take to answer; it takes a tenth of a millisecond."""

KEPT = 3600
"""Seconds after which a state that nobody asks for is forgotten."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How patiently a transport that failed is tried again."""

    first_pause: float = 1.0
    longest_pause: float = 15.0
    """Seconds for which it is left alone before it is probed; each time twice as long."""
    probes: int = 3
    """How many may begin to see whether it is back."""
    first_rate: float = 10.0
    """Begins a second, of all workers, after a probe succeeded; each second twice as many."""
    last_rate: float = 10_000.0
    """From here on nobody is held back: some ten seconds later."""
    fails_again: int = 10
    """Different follow-ups in a row that fail while it recovers until it is left alone again."""

    def arguments(self) -> tuple[float, ...]:
        """Return what the script takes, in its order; pauses in milliseconds."""
        pauses = (self.first_pause * 1000, self.longest_pause * 1000)
        return (*pauses, self.probes, self.first_rate, self.last_rate, self.fails_again, KEPT)


# All times are milliseconds of Redis' own clock.
_REPORT = """
local state, failing = KEYS[1], KEYS[2]
local threshold, wanted, succeeded = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local first_pause, longest_pause, probes = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local first_rate, last_rate, fails_again, kept = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

if succeeded then redis.call('DEL', failing) end
for i = 11, #ARGV do redis.call('SADD', failing, ARGV[i]) end
local failed = #ARGV > 10
if failed then redis.call('EXPIRE', failing, kept) end

local known = redis.call('HMGET', state, 'name', 'until', 'tries', 'since', 'at', 'tokens')
local name, tries = known[1] or 'closed', tonumber(known[3] or 0)
local permits, changed = 0, 0

local function become(next_name, ...)
    name, changed = next_name, 1
    redis.call('HSET', state, 'name', name, ...)
end
local function open()
    local pause = math.min(first_pause * 2 ^ tries, longest_pause)
    become('open', 'since', tries == 0 and now or known[4] or now, 'until', now + pause, 'tries', tries + 1)
    redis.call('DEL', failing)
end
local function grant(most)
    permits = math.min(wanted, math.floor(most))
    return permits
end

if name == 'closed' then
    if redis.call('SCARD', failing) >= threshold then open() end
elseif name == 'recovering' then
    if redis.call('SCARD', failing) >= fails_again then
        open()
    else
        local rate = first_rate * 2 ^ ((now - tonumber(known[2])) / 1000)
        if rate >= last_rate then
            redis.call('DEL', state)
            name, changed = 'closed', 1
        else
            local tokens = math.min(rate, tonumber(known[6]) + (now - tonumber(known[5])) / 1000 * rate)
            redis.call('HSET', state, 'at', now, 'tokens', tokens - grant(tokens))
        end
    end
elseif succeeded then
    become('recovering', 'until', now, 'at', now, 'tokens', 0)
elseif name == 'probing' and failed then
    open()
elseif now >= tonumber(known[2]) and wanted > 0 then
    -- Also when the probes' outcomes do not come: whoever had them may have died.
    become('probing', 'until', now + longest_pause)
    grant(probes)
end
if name ~= 'closed' then redis.call('EXPIRE', state, kept) end
return {name, permits, changed}
"""


class RedisBreaker:
    """The state of one transport; `followups.dispatch.breaker.BreakerStore`. Used from one event loop."""

    def __init__(self, settings: Settings, transport: str, pace: Pace = Pace()) -> None:
        """Take where it is kept; connect to nothing yet."""
        self._redis = Redis.from_url(
            settings.broker_url.get_secret_value(),
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        self._script = self._redis.register_script(_REPORT)
        name = _key(settings, transport)
        self._keys = [name, f"{name}:failing"]
        self._threshold = settings.breaker_failures
        self._pace = pace.arguments()

    async def report(self, failed: Sequence[UUID], wanted: int, *, succeeded: bool) -> Reading:
        """Add outcomes, and ask to begin. Raises `redis.RedisError` or `OSError` when Redis is away."""
        failing = [one.hex for one in failed]
        arguments: list[float | str] = [self._threshold, wanted, int(succeeded), *self._pace, *failing]
        state, permits, changed = await self._script(keys=self._keys, args=arguments)
        return Reading(state, int(permits), changed=bool(changed))

    async def close(self) -> None:
        """Close the connection."""
        await self._redis.aclose()


@dataclass(frozen=True, slots=True)
class Shown:
    """The state for people: since when (seconds ago), and how often it was probed in vain."""

    state: str
    seconds: float
    probed: int


def read(client: redis.Redis, settings: Settings) -> Shown:
    """Return the state of the configured transport. Raises `redis.RedisError` when Redis is away."""
    kept = cast("dict[str, str]", client.hgetall(_key(settings, settings.transport)))
    fields: dict[str, Any] = {_text(name): _text(value) for name, value in kept.items()}
    if not fields:
        return Shown(CLOSED, 0.0, 0)
    seconds, microseconds = client.time()
    since = seconds + microseconds / 1e6 - float(fields.get("since", 0)) / 1000
    return Shown(fields["name"], since, max(0, int(fields.get("tries", 1)) - 1))


def _key(settings: Settings, transport: str) -> str:
    return f"{settings.broker_prefix}breaker:{transport}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
