"""Run migrations, online, one process at a time."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from followups.database import make_engine
from followups.models import Base
from followups.settings import get_settings

LOCK = 0x666F6C6C6F777570
"""Key of the advisory lock that keeps two migrations apart ("followup" in ASCII)."""


def run() -> None:
    """Migrate the database that the caller names, or the one of the settings."""
    url = context.config.attributes.get("database_url") or get_settings().database_url.get_secret_value()
    engine = make_engine(url, statement_timeout=None)  # a large table takes as long as it takes
    try:
        with engine.connect() as connection:
            # Held until the connection closes; a second migration waits here, and then finds it done.
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK})
            connection.commit()
            context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True)
            with context.begin_transaction():
                context.run_migrations()
    finally:
        engine.dispose()


run()
