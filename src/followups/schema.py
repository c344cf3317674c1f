"""The schema's version, and the way from one to another.

Apart from the engine, so that what never migrates (a worker, beat) need not load Alembic: it is a third of what
they import.
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


def alembic_config(database_url: str = "") -> Config:
    """Return Alembic's configuration for the migrations in this package, wherever it is installed."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["database_url"] = database_url
    return config


def migrate(database_url: str, revision: str = "head") -> None:
    """Bring the database to ``revision``. Several at once do no harm: the second waits, then finds it done."""
    command.upgrade(alembic_config(database_url), revision)


def downgrade(database_url: str, revision: str) -> None:
    """Take the database back to ``revision`` (``base`` is before the first)."""
    command.downgrade(alembic_config(database_url), revision)


def is_ready(current: str | None) -> bool:
    """Say whether this code can work on a schema of this version: its own newest, or one that a newer code brought.

    Migrations only add, so that old processes go on while an upgrade replaces them one by one.
    """
    scripts = ScriptDirectory.from_config(alembic_config())
    return current is not None and current not in {one.revision for one in scripts.walk_revisions()} - {
        scripts.get_current_head()
    }


def schema_versions(engine: Engine) -> tuple[str | None, str | None]:
    """Return the revision the database has, and the newest one of this package."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision(), head
