"""Which components report to the heartbeat of a worker or beat, and how long each may be silent.

A worker that has stopped consuming must be detected. A test message in the shared queues would not help, because any
worker could consume it. If each worker had its own queue for such messages, the queues of killed workers would remain
in the broker. No test message is needed, because the consumer polls continuously (`followups.worker.broker.Consumer`).
The broker answers each poll within a second, even when the queues are empty. An idle worker therefore reports as often
as a busy one. The pipeline's event loop sends reports for as long as it runs. The dispatcher's thread reports progress
even while idle. If a tick takes longer than allowed, the reports stop.

While a server is unreachable or the database is read-only, all components keep retrying. Retrying also counts as
progress. A liveness check fails only for problems that a restart would fix. A restart during an outage would lose the
outcomes that are not yet recorded. A worker therefore counts as alive during an outage. The worker's heartbeat shows
what the worker is waiting for. `/readyz` and `followups doctor` show which server is unreachable.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from celery.worker.control import inspect_command

from followups.delivery import events
from followups.telemetry.heartbeat import Heartbeat, HeartbeatError, directory_of
from followups.telemetry.logs import get_logger
from followups.worker.broker import CONSUMER

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from followups.delivery.dispatcher import Dispatcher
    from followups.delivery.pipeline import Pipeline

STARTING = timedelta(seconds=90)
"""Longest time from a worker's start until it reads its queues, including imports and connecting."""

CONNECTING = timedelta(seconds=45)
"""Longest time between two tries to reach the broker.

Each pause between two tries takes at most 3 s, and each try at most 10 s. The limit includes a margin for a busy
machine.
"""

CONSUMING = timedelta(seconds=5)
"""Longest time between two replies from the broker. Detecting a half-open connection takes less time than `CONSUMING`.
A healthy broker answers within a second.
"""

TURNING = timedelta(seconds=20)
"""Longest time between two iterations of the event loop. An iteration usually takes milliseconds, but may take seconds
on an overloaded machine.
"""

TICKING = timedelta(seconds=90)
"""Longest time for one tick: the tick interval plus a few statements of at most 20 s each."""

log = get_logger(__name__)

_hearts: dict[int, Heartbeat | None] = {}
"""The heartbeats by process id; each forked child has its own heartbeat.

A heartbeat that could not be written is None, and is logged once.
"""


def start(runtime_dir: str | None, role: str, name: str) -> Heartbeat | None:
    """Start this process's heartbeat.

    If the heartbeat cannot be written, log a warning and return None: delivery continues.
    """
    if os.getpid() in _hearts:
        return _hearts[os.getpid()]
    heart = Heartbeat(directory_of(runtime_dir), role, name)
    try:
        heart.start()
    except HeartbeatError as error:
        log.warning("no_heartbeat", error=str(error), advice="set FOLLOWUPS_RUNTIME_DIR to a separate directory")
        _hearts[os.getpid()] = None
    else:
        _hearts[os.getpid()] = heart
    return _hearts[os.getpid()]


def current() -> Heartbeat | None:
    """Return this process's heartbeat, or None if it has none."""
    return _hearts.get(os.getpid())


def stop() -> None:
    """End this process's heartbeat."""
    if heart := _hearts.pop(os.getpid(), None):
        heart.stop()


def watch_consumer(heart: Heartbeat, silence: timedelta, wanted: Callable[[], Collection[str]]) -> None:
    """Make the heartbeat depend on the consumer, too.

    ``wanted`` is a function that returns the queues that the consumer reads. ``silence`` is the longest time that the
    broker may take to reply.
    """
    heart.report("consumer", STARTING, "has not begun to consume")
    heart.probe(partial(_report_consumer, heart, silence * 3 + CONSUMING, wanted))


def _report_consumer(heart: Heartbeat, within: timedelta, wanted: Callable[[], Collection[str]]) -> None:
    answered, connecting = CONSUMER.answered_at, CONSUMER.connecting_at
    if connecting > answered:
        heart.report("consumer", CONNECTING, "has not tried to reach the broker", at=connecting)
    elif answered and CONSUMER.queues >= set(wanted()):
        heart.report("consumer", within, "has not asked the broker for work", at=answered)


@inspect_command()
def signs_of_life(_state: object) -> dict[str, str]:
    """Return this worker's state for ``celery inspect signs_of_life`` and `followups doctor`."""
    heart = current()
    return {"trouble": heart.trouble() if heart else "", "waits": heart.waits() if heart else ""}


def watch_work(heart: Heartbeat, dispatcher: Dispatcher, pipeline: Pipeline) -> None:
    """Include the dispatcher and the pipeline in the heartbeat."""
    heart.probe(partial(_report_dispatcher, heart, dispatcher))
    heart.probe(partial(_report_pipeline, heart, pipeline))
    heart.probe(partial(_report_outage, heart))
    _report_dispatcher(heart, dispatcher)
    heart.report("pipeline", TURNING, _STUCK)


def _report_dispatcher(heart: Heartbeat, dispatcher: Dispatcher) -> None:
    if dispatcher.is_alive:
        heart.report("dispatcher", TICKING, "has been busy with one tick", at=dispatcher.busy_since or time.monotonic())


_STUCK = "has sent and recorded nothing: its event loop has been stuck"


def _report_pipeline(heart: Heartbeat, pipeline: Pipeline) -> None:
    pipeline.ask(partial(heart.report, "pipeline", TURNING, _STUCK))


def _report_outage(heart: Heartbeat) -> None:
    found = events.outage()
    heart.wait(found.why, found.since) if found else heart.wait("")


def drain(within: timedelta) -> None:
    """Stop expecting reports from the components, because the process is about to end."""
    if heart := current():
        heart.end(within, "has been stopping")
