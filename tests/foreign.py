"""Databases with defaults and encodings that the service does not expect."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from databases import SUPERUSER, url_as, url_of
from followups.transactions import in_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

HOSTILE: Mapping[str, str] = {
    "default_transaction_isolation": "repeatable read",
    "default_transaction_deferrable": "on",
    "client_encoding": "LATIN1",
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "TimeZone": "Asia/Kolkata",
    "bytea_output": "escape",
    "array_nulls": "off",
    "extra_float_digits": "-15",
    "standard_conforming_strings": "off",
    "escape_string_warning": "off",
    "transform_null_equals": "on",
    "lock_timeout": "1ms",
    "idle_session_timeout": "5s",
    "plan_cache_mode": "force_custom_plan",
}
"""Unusual server defaults that would break a statement or change its result if they took effect."""


def set_defaults(database_url: str, defaults: Mapping[str, str]) -> None:
    """Set the defaults of the database, and those of the role in this database, which take precedence."""
    url = make_url(database_url)
    database, role = sql.Identifier(url.database or ""), sql.Identifier(url.username or "")
    with psycopg.connect(url_as(database_url, SUPERUSER), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")  # new sessions may be read-only by default
        for name, value in defaults.items():
            setting = sql.SQL("SET {} = {}").format(sql.Identifier(name), sql.Literal(value))
            connection.execute(sql.SQL("ALTER DATABASE {} ").format(database) + setting)
            connection.execute(sql.SQL("ALTER ROLE {} IN DATABASE {} ").format(role, database) + setting)


def create_database_of_encoding(server_url: str, name: str, encoding: str) -> str:
    """Create a database with another text encoding; return its URL."""
    statement = "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LOCALE_PROVIDER libc LOCALE 'C'"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(sql.Identifier(name), sql.Literal(encoding)))
    return url_of(server_url, name)


@contextmanager
def read_only(database_url: str) -> Iterator[None]:
    """Make new sessions of the database read-only, like those of a standby."""
    database = sql.Identifier(make_url(database_url).database or "")
    with psycopg.connect(url_of(database_url, "postgres", SUPERUSER), autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(database))
        yield
        connection.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(database))


def url_for_any_server(database_url: str) -> str:
    """Return the URL for a client that also accepts a read-only server."""
    return f"{database_url}&target_session_attrs=any"


async def refused_once(engine: AsyncEngine, write: Callable[[Engine], object], sessions: int) -> DBAPIError:
    """Check that only the first of several writes fails; return the error."""
    with pytest.raises(DBAPIError) as refused:
        await in_loop(engine, write)
    for _ in range(sessions):
        await in_loop(engine, write)
    return refused.value
