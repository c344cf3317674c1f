"""Opens a command's database connection, and requests a tick after the command."""

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
"""How long a command waits for the broker.

If the command cannot send a tick, beat's next regular tick follows soon.
"""


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
    """Yield a session whose transaction is committed at the end of the block.

    Objects loaded in the session stay readable after the commit.
    """
    with engine() as made, Session(made, expire_on_commit=False) as opened, opened.begin():
        yield opened


def actor() -> Actor:
    """Return the operating-system user that runs this command, as the actor of its changes."""
    return user_of_process(Way.COMMAND)


def nudge_if_soon(due: datetime, now: datetime) -> None:
    """Request a tick if ``due`` is before the next regular tick.

    Errors are ignored, because beat sends regular ticks anyway.
    """
    if due - now <= get_settings().tick_interval:
        ask_for_tick()


def ask_for_tick() -> None:
    """Send a tick to the broker, waiting at most `PATIENCE`."""
    from followups.worker import celery_app  # noqa: PLC0415 - loads Celery, which other commands don't need

    def send() -> None:
        with suppress(Exception):  # the change is committed, so the next regular tick sends what is due
            celery_app.ask_for_tick()

    # A thread sends the tick, because an unreachable broker may block the client for a long time.
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sender.join(PATIENCE.total_seconds())


def ask_workers() -> Replies:
    """Wait one second for the workers' replies and return them. Raises the errors of the broker's client."""
    from followups.worker import celery_app  # noqa: PLC0415 - likewise

    return celery_app.ask_workers()
