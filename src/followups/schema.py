"""The schema's version, and the migrations between versions.

Worker and beat never migrate and need not import Alembic, so this module is separate from the engine. Alembic would
make up a third of what worker and beat import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

if TYPE_CHECKING:
    from sqlalchemy import Engine


WAIT = 60.0
"""Seconds for which a migration waits for another migration to end."""

PATIENCE = 600.0
"""How many seconds a migration tries to lock tables that long transactions use."""


def alembic_config(database_url: str = "", *, wait: float = WAIT, patience: float = PATIENCE) -> Config:
    """Return Alembic's configuration for the migrations in this package."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes.update(database_url=database_url, wait=wait, patience=patience)
    return config


def migrate(database_url: str, revision: str = "head", *, wait: float = WAIT, patience: float = PATIENCE) -> None:
    """Migrate the database to ``revision``.

    Concurrent migrations are safe: the second migration waits, and then finds nothing to do. Raises `FollowUpsError` if
    another migration keeps its lock for ``wait`` seconds. Also raises `FollowUpsError` if a long transaction locks a
    table for ``patience`` seconds.
    """
    command.upgrade(alembic_config(database_url, wait=wait, patience=patience), revision)


def downgrade(database_url: str, revision: str) -> None:
    """Downgrade the database to ``revision`` (``base`` is the empty schema before the first migration)."""
    command.downgrade(alembic_config(database_url), revision)


def is_ready(current: str | None) -> bool:
    """Return whether the schema version ``current`` is at least as new as this code.

    Migrations only add to the schema, so old processes keep working during an upgrade.
    """
    scripts = ScriptDirectory.from_config(alembic_config())
    return current is not None and current not in {one.revision for one in scripts.walk_revisions()} - {
        scripts.get_current_head()
    }


def schema_versions(engine: Engine) -> tuple[str | None, str | None]:
    """Return the database's schema revision, and the newest revision in this package."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision(), head
