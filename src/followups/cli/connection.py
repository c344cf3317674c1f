"""Connections to the database and the broker for the duration of one command."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING

import redis
from sqlalchemy.orm import Session

from followups.database import make_engine
from followups.settings import get_settings
from followups.urls import database_url as parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from sqlalchemy import Engine

    from followups.settings import Settings


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


def broker_client(settings: Settings, patience: timedelta) -> redis.Redis:
    """Return a client of the broker, to be closed by the caller. It does not retry."""
    url, seconds = settings.broker_url.get_secret_value(), patience.total_seconds()
    return redis.Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds, retry=None)


def place_of(database_url: str) -> str:
    """Return the name and host of a database for display, without user and password.

    >>> place_of("postgresql://me:secret@db.example:5433/chats")
    "'chats' at db.example:5433"
    >>> place_of("postgresql://me@/chats?host=/run/postgresql")
    "'chats' at /run/postgresql"
    >>> place_of("postgresql://one:5433,two/chats?target_session_attrs=primary")
    "'chats' at one:5433,two"
    """
    url = parse(database_url)
    host = url.host or url.query.get("host") or "localhost"
    hosts = host if isinstance(host, tuple) else host.split(",")
    ports = str(url.port or url.query.get("port") or "").split(",")
    named = ",".join(f"{one}:{port}" if port else one for one, port in zip_longest(hosts, ports[: len(hosts)]))
    return f"'{url.database or ''}' at {named}"
