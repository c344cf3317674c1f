"""The database for the duration of one command, and a tick after it."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from followups.database import make_engine
from followups.settings import get_settings
from followups.store.audit import Actor, Way, user_of_process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from sqlalchemy import Engine

    from followups.operations.doctor.process_checks import Replies

PATIENCE = timedelta(seconds=5)
"""How long a command waits for the broker; without this tick, the next one does the same a little later."""


@contextmanager
def engine() -> Iterator[Engine]:
    """Yield an engine for the configured database."""
    made = make_engine(get_settings().database_url.get_secret_value(), pool_size=1, application_name="followups-cli")
    try:
        yield made
    finally:
        made.dispose()


@contextmanager
def session() -> Iterator[Session]:
    """Yield a session. Its transaction is committed at the end of the block, and its objects stay readable."""
    with engine() as made, Session(made, expire_on_commit=False) as opened, opened.begin():
        yield opened


def actor() -> Actor:
    """Return the operating-system user, who runs this command, as the actor of its changes."""
    return user_of_process(Way.COMMAND)


def nudge_if_soon(due: datetime, now: datetime) -> None:
    """Ask for a tick if ``due`` comes before the next regular one. Errors are ignored, since beat's ticks continue."""
    if due - now <= get_settings().tick_interval:
        ask_for_tick()


def ask_for_tick() -> None:
    """Send a tick, within `PATIENCE`."""
    from followups.worker import celery_app  # noqa: PLC0415 - loads Celery, which other commands don't need

    def send() -> None:
        with suppress(Exception):  # the change is committed; the next regular tick finds it
            celery_app.ask_for_tick()

    # In a thread, since a client of an unreachable broker may block longer than an operator would wait.
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sender.join(PATIENCE.total_seconds())


def ask_workers() -> Replies:
    """Return the answers of all workers, after a second. Raises what the broker's client raises."""
    from followups.worker import celery_app  # noqa: PLC0415 - likewise

    return celery_app.ask_workers()
