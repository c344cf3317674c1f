"""Run migrations, online, one process at a time."""

from __future__ import annotations

import time

from alembic import context
from sqlalchemy import text

from followups.database import make_engine
from followups.models import Base
from followups.settings import get_settings

LOCK = 0x666F6C6C6F777570
"""Key of the advisory lock that keeps two migrations apart ("followup" in ASCII)."""

ASK_AGAIN = 0.2
"""Seconds between two questions whether the other migration has ended."""


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
            context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True)
            with context.begin_transaction():
                context.run_migrations()
    finally:
        engine.dispose()


run()
