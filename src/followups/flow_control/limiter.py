"""Rate limits of deliveries: token buckets and the queues before them, in two scripts (``take``, ``give_back``).

They protect others from us. Losing them costs a burst, and the order of the waiting follow-ups.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from redis import RedisError

from followups.delivery.rate_limiting import LONGEST, Answer
from followups.flow_control import PAUSE, TIMEOUT, connect, script
from followups.telemetry import metrics
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from redis.commands.core import AsyncScript

    from followups.delivery.rate_limiting import Bucket, Request
    from followups.settings import Settings

log = get_logger(__name__)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


class RedisLimiter:
    """Runs the scripts, from one event loop; it never raises if Redis is unreachable."""

    def __init__(self, settings: Settings, timeout: timedelta = TIMEOUT) -> None:
        """Take the settings; connect to nothing yet."""
        self._prefix = f"{settings.broker_prefix}limit:"
        self._client = connect(settings, timeout)
        self._take = self._client.register_script(script("take.lua"))
        self._put_back = self._client.register_script(script("give_back.lua"))
        self._ask_again_at = 0.0

    async def ask(self, requests: Sequence[Request], ended: Sequence[Request]) -> Answer:
        """Take tokens for those whose turn it is; if Redis is unreachable, all may go."""
        buckets = _numbered((*requests, *ended))
        limits = [(bucket.rate, bucket.burst) for bucket in buckets]
        documents = (limits, _documents(requests, buckets), _documents(ended, buckets))
        longest = str(LONGEST // MICROSECOND)
        told = await self._try(self._take, buckets, *map(json.dumps, documents), longest)
        if told is None:
            metrics.LIMITER_UNAVAILABLE.inc(len(requests))
            return Answer((timedelta(0),) * len(requests))
        moment, *waits = map(int, told)
        return Answer(tuple(wait * MICROSECOND for wait in waits), moment)

    async def give_back(self, requests: Sequence[Request], moment: int) -> None:
        """Return the tokens taken for these; if Redis is unreachable, they are lost."""
        unused = Counter(bucket for request in requests for bucket in request.buckets)
        limits = [(bucket.rate, bucket.burst, count) for bucket, count in unused.items()]
        await self._try(self._put_back, unused, str(moment), json.dumps(limits))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _try(self, scripted: AsyncScript, buckets: Iterable[Bucket], *arguments: str) -> list[str] | None:
        """Return the script's result, or None if Redis is unreachable or was a moment ago."""
        if time.monotonic() < self._ask_again_at:
            return None
        try:
            answer: list[str] = await scripted([f"{self._prefix}{bucket.key}" for bucket in buckets], arguments)
        except (RedisError, OSError) as error:
            self._ask_again_at = time.monotonic() + PAUSE.total_seconds()
            log.warning("limiter_unavailable", error=type(error).__name__, pause_s=PAUSE.total_seconds())
            return None
        return answer


def _numbered(requests: Iterable[Request]) -> dict[Bucket, int]:
    """Return each bucket's number as Lua counts, from 1."""
    buckets = dict.fromkeys(bucket for request in requests for bucket in request.buckets)
    return {bucket: number for number, bucket in enumerate(buckets, start=1)}


def _documents(requests: Iterable[Request], buckets: dict[Bucket, int]) -> list[tuple[str, str, list[int]]]:
    # Moments are passed as text: as a number, Lua would write sixteen digits as 1.7e+15.
    return [
        (request.id.hex, str((request.since - EPOCH) // MICROSECOND), [buckets[each] for each in request.buckets])
        for request in requests
    ]
