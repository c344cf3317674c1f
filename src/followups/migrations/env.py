"""Run migrations, online, one process at a time."""

from __future__ import annotations

import time

from alembic import context
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from followups.database import make_engine
from followups.errors import FollowUpsError
from followups.models import Base
from followups.settings import get_settings

LOCK = 0x666F6C6C6F777570
"""Key of the advisory lock that keeps two migrations apart ("followup" in ASCII)."""

ASK_AGAIN = 0.2
"""Seconds between two questions whether the other migration has ended."""


LOCK_TIMEOUT = "3s"
"""How long a change of a table waits for whoever uses it: all others would wait behind it meanwhile."""

GIVE_WAY = 1.0
"""Seconds for which those others go first, until the next try."""

PATIENCE = 600.0
"""Seconds after which a migration gives up that never gets its turn."""


def _migrate(connection: Connection) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
        connection.commit()
        context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True)
        try:
            with context.begin_transaction():
                context.run_migrations()
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
            connection.rollback()
            if time.monotonic() > deadline:
                message = (
                    "A table is in use by a long transaction: end it (followups doctor names it), and migrate again."
                )
                raise FollowUpsError(message) from error
            time.sleep(GIVE_WAY)
        else:
            return


def run() -> None:
    """Migrate the database that the caller names, or the one of the settings."""
    url = context.config.attributes.get("database_url") or get_settings().database_url.get_secret_value()
    engine = make_engine(url, statement_timeout=None)  # a large table takes as long as it takes
    try:
        with engine.connect() as connection:
            # Held until the connection closes; a second migration waits here, and then finds it done. It asks again
            # and again: while it waited inside a statement, an index that is made concurrently would wait for it.
            while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK}):
                connection.rollback()
                time.sleep(ASK_AGAIN)
            connection.commit()
            _migrate(connection)
    finally:
        engine.dispose()


run()
