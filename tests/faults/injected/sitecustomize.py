"""Failpoints: Python finds this file only if a test puts its directory on PYTHONPATH; the package has none of it.

When `followups.worker` is about to be imported, the steps of dispatching are wrapped. At each failpoint a process looks
into the directory in FOLLOWUPS_TEST_FAILPOINTS. A file there arms the failpoint for one hit, and its content is the
action (`faults.failpoints` writes it). FOLLOWUPS_TEST_CLOCK_OFFSET shifts the process's clock by so many seconds.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import signal
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

ARMED = os.environ.get("FOLLOWUPS_TEST_FAILPOINTS", "")
CLOCK_OFFSET = float(os.environ.get("FOLLOWUPS_TEST_CLOCK_OFFSET", "0"))

step: contextvars.ContextVar[str] = contextvars.ContextVar("step", default="")
"""The step that this thread, or this task of the event loop, is in."""


def hit(point: str) -> None:
    """Do what the point is armed with, if it is; each arming is taken by one hit of one process."""
    for name in sorted(each for each in os.listdir(ARMED) if each.startswith(f"{point}@")):  # noqa: PTH208 - on a hot path
        taken = Path(ARMED, f"taken.{name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):  # another process took it
            Path(ARMED, name).rename(taken)
            _act(taken.read_text())
            return


def _act(action: str) -> None:
    kind, _, argument = action.partition(" ")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "suspend":
        _suspend()
    elif kind == "sleep":
        time.sleep(float(argument))
    elif kind == "raise":
        from psycopg import OperationalError  # noqa: PLC0415 - only where it is wanted

        message = "the connection broke (a test's doing)"
        raise OperationalError(message)
    else:
        message = f"no such action: {action}"
        raise ValueError(message)


def _suspend() -> None:
    """Stop like a suspended machine: Python's monotonic clock stops, and the uptime clock keeps running."""
    counts_on = time.monotonic
    asleep = counts_on()
    os.kill(os.getpid(), signal.SIGSTOP)
    while counts_on() - asleep < 0.5:  # the signal comes a moment later
        time.sleep(0.001)
    slept = counts_on() - asleep
    time.monotonic = lambda: counts_on() - slept


def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a step: points ``name.before`` and ``name.committed``."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        hit(f"{name}.before")
        step.set(name)
        try:
            result = function(*arguments, **named)
        finally:
            step.set("")
        hit(f"{name}.committed")
        return result

    return wrapped


def around_send(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of the transport: points ``send.before`` and ``send.answered``."""

    @functools.wraps(function)
    async def wrapped(*arguments: Any, **named: Any) -> Any:
        hit("send.before")
        hit(f"send.of.{arguments[1].lease.id}")
        result = await function(*arguments, **named)
        hit("send.answered")
        return result

    return wrapped


def around_commit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a connection's commit: points ``<step>.before_commit`` and ``<step>.answer_lost`` (it was committed)."""

    @functools.wraps(function)
    def wrapped(connection: Any) -> None:
        if name := step.get():
            hit(f"{name}.before_commit")
        function(connection)
        if name:
            try:
                hit(f"{name}.answer_lost")
            except Exception:
                connection.close()
                raise

    return wrapped


def around_async_commit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the commit of an event loop's connection in the same way."""

    @functools.wraps(function)
    async def wrapped(connection: Any) -> None:
        if name := step.get():
            hit(f"{name}.before_commit")
        await function(connection)
        if name:
            try:
                hit(f"{name}.answer_lost")
            except Exception:
                await connection.close()
                raise

    return wrapped


def install() -> None:
    """Wrap the steps."""
    import psycopg  # noqa: PLC0415 - not in every process that Python starts here

    from followups.delivery import begin, dispatcher, pipeline, settle  # noqa: PLC0415 - as above

    dispatcher.claim = around("claim", dispatcher.claim)
    begin.begin = around("begin", begin.begin)
    settle.settle = around("settle", settle.settle)
    pipeline.send = around_send(pipeline.send)
    psycopg.Connection.commit = around_commit(psycopg.Connection.commit)  # type: ignore[method-assign]
    asynchronous = psycopg.AsyncConnection
    asynchronous.commit = around_async_commit(asynchronous.commit)  # type: ignore[method-assign]


class BeforeWorker:
    """Runs `install` before `followups.worker` is imported."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return nothing, ever: the usual finders do the rest."""
        if name == "followups.worker":
            sys.meta_path.remove(cls)  # type: ignore[arg-type]
            install()
            return PathFinder.find_spec(name, path)
        return None


if ARMED:
    sys.meta_path.insert(0, BeforeWorker)  # type: ignore[arg-type]
if CLOCK_OFFSET:
    import datetime as dt

    import time_machine

    wrong = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=CLOCK_OFFSET)
    time_machine.travel(wrong, tick=True).start()
