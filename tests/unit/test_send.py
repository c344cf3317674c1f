"""A single call to the transport. The call has a time limit and always ends in an outcome."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from followups.delivery.attempts import Attempt, Begun
from followups.delivery.clock import DatabaseClock
from followups.delivery.send import CallTimeout, send
from followups.flow_control.breaker import Breaker
from followups.store.leases import Lease
from followups.transports.port import Delivery, Outcome, Sent, Unknown
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from followups.transports.port import Transport

NO_BREAKER = Breaker(None, "http", 0)
SOON = timedelta(milliseconds=50)
NOW = datetime.now(UTC)
LEASE = Lease(uuid4(), 1, NOW)
BEGUN = Begun(
    LEASE, Delivery(LEASE.id, uuid4(), uuid4(), "web", None, uuid4(), "Are you still there?", NOW, 1), snoozes=0
)


class Plugin:
    """A transport whose behaviour is given by a function."""

    name = "plugin"

    def __init__(self, does: Callable[[], Awaitable[Outcome]]) -> None:
        self.does = does

    async def send(self, _delivery: Delivery) -> Outcome:
        return await self.does()


async def attempt(does: Callable[[], Awaitable[Outcome]], limit: timedelta = SOON) -> Attempt | None:
    """Make one call with a time limit."""
    clock = DatabaseClock()
    clock.observe(NOW, uptime(), uptime())
    transport: Transport = Plugin(does)  # type: ignore[assignment]  # as much of one as a call needs
    return await send(transport, BEGUN, clock, CallTimeout(limit), uptime() + 60, NO_BREAKER)


async def outcome(does: Callable[[], Awaitable[Outcome]], limit: timedelta = SOON) -> Outcome:
    """Return the outcome of a call, and check that the calling task can continue normally."""
    made = await attempt(does, limit)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(2 * limit.total_seconds())  # a time limit that is still set would end this sleep
    assert made is not None
    return made.outcome


async def hang() -> Outcome:
    """Wait for longer than any test takes."""
    await asyncio.Event().wait()
    return Sent()


async def test_a_hanging_call_is_stopped() -> None:
    """A call that exceeds the time limit is stopped, and its outcome is unknown."""
    assert await outcome(hang) == Unknown("no outcome within 0.05 s")


async def test_a_call_in_time() -> None:
    """If a call ends in time, its outcome counts, and its timeout no longer applies."""

    async def answer() -> Outcome:
        await asyncio.sleep(0.01)
        return Sent(status_code=200)

    assert await outcome(answer, timedelta(seconds=0.5)) == Sent(status_code=200)


class Accepted(Sent):
    """A plug-in's own subclass of `Sent`."""


@pytest.mark.parametrize("given", [Accepted(status_code=200), Sent(None, 200, None), Sent(None, 200, b"")])  # type: ignore[arg-type]
async def test_a_plug_in_s_own_kind_of_outcome(given: Sent) -> None:
    """If a plug-in returns a subclass of an outcome, the plain outcome is recorded."""

    async def answer() -> Outcome:
        return given

    assert repr(await outcome(answer)) == repr(Sent(status_code=200))


async def test_an_outcome_while_being_stopped() -> None:
    """If a transport returns an outcome while it is being stopped, this outcome is recorded."""

    async def insist() -> Outcome:
        try:
            return await hang()
        except asyncio.CancelledError:
            return Sent(status_code=201)

    assert await outcome(insist) == Sent(status_code=201)


async def test_an_error_when_stopped() -> None:
    """If a transport raises an error while it is being stopped, the outcome is unknown."""

    async def break_down() -> Outcome:
        try:
            return await hang()
        except asyncio.CancelledError:
            raise RuntimeError from None

    assert await outcome(break_down) == Unknown("the transport raised RuntimeError")


@pytest.mark.parametrize("error", [TimeoutError, asyncio.CancelledError, SystemExit, KeyError])
async def test_exceptions_of_a_transport(error: type[BaseException]) -> None:
    """If a transport raises an exception, its class is reported and the process continues."""

    async def fail() -> Outcome:
        raise error

    assert await outcome(fail) == Unknown(f"the transport raised {error.__name__}")


async def test_cancelled_from_outside() -> None:
    """If the calling task is cancelled, the call is cancelled too and has no outcome."""
    task = asyncio.create_task(attempt(hang, timedelta(seconds=60)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_from_outside_as_the_limit_ends() -> None:
    """If the task is cancelled just as the time limit expires, the call has no outcome."""

    async def block() -> Outcome:
        # the blocking `time.sleep` lasts beyond the time limit
        asyncio.get_running_loop().call_later(0.01, time.sleep, 0.1)
        asyncio.get_running_loop().call_later(0.02, task.cancel)
        return await hang()

    task = asyncio.create_task(attempt(block))
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_calls_share_one_timer() -> None:
    """Each call stops at its own time limit, and other calls end normally."""
    timeout = CallTimeout(timedelta(milliseconds=500))
    clock = DatabaseClock()
    clock.observe(NOW, uptime(), uptime())

    async def call(does: Callable[[], Awaitable[Outcome]], after: float) -> tuple[Outcome, float]:
        await asyncio.sleep(after)
        transport: Transport = Plugin(does)  # type: ignore[assignment]  # as much of one as a call needs
        made = await send(transport, BEGUN, clock, timeout, uptime() + 60, NO_BREAKER)
        assert made is not None
        return made.outcome, made.seconds

    async def answer() -> Outcome:
        await asyncio.sleep(0.02)
        return Sent()

    calls = [(hang, 0.0), (answer, 0.01), (hang, 0.05), (answer, 0.09), (hang, 0.6)]
    for (does, _), (outcome, seconds) in zip(calls, await asyncio.gather(*(call(*one) for one in calls)), strict=True):
        assert (outcome == Sent()) == (does is answer)
        assert does is answer or seconds > 0.49
