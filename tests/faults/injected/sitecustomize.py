"""Adds failpoints to processes under test, which load this file through PYTHONPATH.

Importing `followups.worker` adds failpoints to its dispatching steps. At each failpoint, a process looks into the
directory FOLLOWUPS_TEST_FAILPOINTS. A file written by `faults.failpoints` arms a failpoint for one hit and contains the
action. FOLLOWUPS_TEST_CLOCK_OFFSET shifts the process's clock by that many seconds.
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
"""The name of the step that this thread or event-loop task is executing."""


def hit(point: str) -> None:
    """Execute the failpoint's armed action, if any; only one process executes each action."""
    for name in sorted(each for each in os.listdir(ARMED) if each.startswith(f"{point}@")):  # noqa: PTH208 - on a hot path
        taken = Path(ARMED, f"taken.{name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):  # another process has already taken this failpoint's action
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
    """Imitate a suspended machine: Python's monotonic clock stops, but the uptime clock continues."""
    counts_on = time.monotonic
    asleep = counts_on()
    os.kill(os.getpid(), signal.SIGSTOP)
    while counts_on() - asleep < 0.5:  # SIGSTOP takes effect a moment later
        time.sleep(0.001)
    slept = counts_on() - asleep
    time.monotonic = lambda: counts_on() - slept


def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function with the failpoints ``name.before`` and ``name.committed``."""

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
    """Wrap the transport's call with the failpoints ``send.before`` and ``send.answered``."""

    @functools.wraps(function)
    async def wrapped(*arguments: Any, **named: Any) -> Any:
        hit("send.before")
        hit(f"send.of.{arguments[1].lease.id}")
        result = await function(*arguments, **named)
        hit("send.answered")
        return result

    return wrapped


def around_commit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a connection's commit with the failpoints ``<step>.before_commit`` and ``<step>.answer_lost``.

    At the failpoint ``<step>.answer_lost``, the transaction has already been committed.
    """

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
    """Wrap an asyncio connection's commit with the same failpoints as `around_commit`."""

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
    """Wrap all steps with failpoints."""
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
    """An import hook that runs `install` before `followups.worker` is imported."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None, so that Python's standard finders import the module."""
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
