"""Tests of the worker's heartbeat: a stuck component stops reporting, while others continue."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from followups.database import make_async_engine
from followups.delivery.dispatcher import Dispatcher
from followups.delivery.pipeline import Pipeline
from followups.session_settings import ONCE_PLANNED
from followups.telemetry.heartbeat import Heartbeat
from followups.transports.sandbox.transport import SandboxTransport
from followups.worker import liveness
from stack import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Engine

    from followups.settings import Settings
    from world import World


def test_a_stuck_loop_and_a_stuck_tick(
    settings: Settings, engine: Engine, database_url: str, world: World, tmp_path: Path
) -> None:
    """Even an idle pipeline or dispatcher reports regularly.

    If a component is stuck, the time since its last report grows.
    """
    stuck = threading.Event()
    dispatcher = Dispatcher(settings, engine, lambda _: stuck.wait() and None)
    pipeline = Pipeline(settings, make_async_engine(database_url, options=ONCE_PLANNED), SandboxTransport(settings))
    heart = Heartbeat(tmp_path, "worker", "w@here")
    dispatcher.start()
    pipeline.start()
    heart.start()
    liveness.watch_work(heart, dispatcher, pipeline)

    def age(component: str) -> float:
        report: dict[str, Any] = heart.components()[component]
        return time.monotonic() - report["since"]

    try:
        time.sleep(2.5)
        assert (age("pipeline") < 2, age("dispatcher") < 2) == (True, True)
        world.follow_up()
        dispatcher.tick()
        pipeline.ask(stuck.wait)  # type: ignore[arg-type] # what it answers is nobody's business
        wait_until(lambda: age("pipeline") > 2 and age("dispatcher") > 2)
    finally:
        stuck.set()
        dispatcher.stop()
        pipeline.drain(timedelta(seconds=10))
        heart.stop()
