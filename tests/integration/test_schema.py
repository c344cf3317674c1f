"""The schema: migrations create what the models declare and can be reverted."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Connection, Engine, event, insert, text
from sqlalchemy.exc import IntegrityError

from databases import OWNER, create_database, drop_database, url_as, url_of
from followups.database import BoundedConnection, make_engine
from followups.models import Base
from followups.schema import downgrade, migrate, schema_versions
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from world import World

COLUMNS = """
    SELECT table_name, column_name, data_type, is_nullable, column_default, is_identity
      FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version'
"""
CONSTRAINTS = """
    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
      FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'
"""
INDEXES = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
OPTIONS = """
    SELECT relname, reloptions, relrowsecurity FROM pg_class
     WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname <> 'alembic_version'
"""


HOURS = """
    INSERT INTO sending_hours (workspace_id, time_zone, opening, closing, days, open_from, open_until)
    VALUES (:id, 'UTC', '08:00', '20:00', 127, now(), now())
"""


@pytest.fixture
def empty_engine(postgres_url: str, database_url: str) -> Iterator[Engine]:
    """Return an engine connected to an empty database."""
    name = f"{database_url.rpartition('/')[2].partition('?')[0]}_empty"
    create_database(postgres_url, name)
    engine = make_engine(url_of(postgres_url, name, OWNER))
    yield engine
    engine.dispose()
    drop_database(postgres_url, name)


def described(engine: Engine, query: str) -> list[tuple[object, ...]]:
    """Return the contents of the database's system catalogue in a stable order."""
    with engine.connect() as connection:
        return sorted((tuple(row) for row in connection.execute(text(query))), key=repr)


@pytest.mark.parametrize("query", [COLUMNS, CONSTRAINTS, INDEXES, OPTIONS])
def test_models_agree_with_migrations(engine: Engine, empty_engine: Engine, query: str) -> None:
    """Migrations and models create the same tables: columns, constraints, indexes and options."""
    Base.metadata.create_all(empty_engine)
    assert described(engine, query) == described(empty_engine, query)


def test_down_and_up_again(empty_engine: Engine) -> None:
    """Every migration can be reverted and then repeated; migrating twice changes nothing."""
    url = empty_engine.url.render_as_string(hide_password=False).replace("+psycopg", "")
    migrate(url)
    tables = described(empty_engine, CONSTRAINTS)
    current, head = schema_versions(empty_engine)
    assert current == head
    downgrade(url, "base")
    assert described(empty_engine, CONSTRAINTS) == []
    migrate(url)
    migrate(url)
    assert described(empty_engine, CONSTRAINTS) == tables


@pytest.mark.parametrize(
    "change",
    [
        "status = 'sent'",
        "status = 'failed', finished_at = now()",
        "status = 'cancelled', finished_at = now()",
        "status = 'sent', finished_at = now(), reason = 'x'",
        "reason = 'x'",
        "finished_at = now()",
        "status = 'leased'",
        "message = ''",
        "begun_at = now()",
        "attempts = -1",
        "chat_id = gen_random_uuid()",
    ],
)
def test_contradictory_rows_are_rejected(world: World, change: str) -> None:
    """The database rejects a row with a contradictory state."""
    follow_up = world.follow_up()
    with pytest.raises(IntegrityError):
        world.sql(f"UPDATE follow_ups SET {change} WHERE id = :id", id=follow_up)  # noqa: S608 - constants of this file


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0044-03-15 BC", "0001-06-01", "10000-01-01"])
@pytest.mark.parametrize(
    ("table", "column"),
    [
        *(("follow_ups", column) for column in ("due_date", "scheduled_at", "next_attempt_at", "held_until")),
        *(("follow_ups", column) for column in ("sendable_from", "limited_until", "accepted_at", "lease_until")),
        ("chats", "last_user_message_at"),
        ("chats", "last_message_at"),
        ("sending_hours", "open_from"),
        ("sending_hours", "open_until"),
    ],
)
def test_unreadable_times_are_rejected(world: World, table: str, column: str, moment: str) -> None:
    """The database rejects a time that Python cannot represent, since no reader could load it."""
    world.follow_up()
    world.sql(HOURS, id=world.workspace_id)
    with pytest.raises(IntegrityError, match="readable"):
        world.sql(f"UPDATE {table} SET {column} = CAST(:moment AS timestamptz)", moment=moment)  # noqa: S608 - constants of this file


@pytest.mark.parametrize("column", ["opening", "closing"])
def test_24_o_clock(world: World, column: str) -> None:
    """The database rejects sending hours that begin or end at 24:00, which Python cannot represent."""
    world.sql(HOURS, id=world.workspace_id)
    with pytest.raises(IntegrityError, match="readable"):
        world.sql(f"UPDATE sending_hours SET {column} = '24:00'")  # noqa: S608 - constants of this file


def test_existing_invalid_rows_stop_no_migration(world: World, database_url: str) -> None:
    """If existing rows violate a new constraint, the migration omits the constraint.

    The migration adds every constraint that all existing rows satisfy.
    """
    owner = url_as(database_url, OWNER)
    downgrade(owner, "0008")
    world.sql(HOURS, id=world.workspace_id)
    world.sql("UPDATE sending_hours SET closing = '24:00'")
    migrate(owner)
    names = "SELECT string_agg(conrelid::regclass::text, ' ' ORDER BY 1) FROM pg_constraint WHERE conname LIKE {}"
    assert world.scalar(names.format("'%times_are_readable'")) == "chats follow_ups"
    assert world.scalar("SELECT closing::text FROM sending_hours") == "24:00:00"
    assert world.scalar("SELECT bool_and(convalidated) FROM pg_constraint WHERE contype = 'c'")


def test_chat_of_another_workspace(world: World) -> None:
    """A follow-up cannot be moved into another workspace's chat."""
    theirs = type(world)(world.engine)
    chat: UUID = theirs.chat()
    with pytest.raises(IntegrityError):
        world.follow_up(chat)


def test_row_with_the_contracts_columns_alone(world: World) -> None:
    """A row with only the published columns is a valid follow-up."""
    chat = world.chat()
    with world.engine.begin() as connection:
        table = Base.metadata.tables["follow_ups"]
        values = {"workspace_id": world.workspace_id, "chat_id": chat, "message": "Hello?", "due_date": text("now()")}
        connection.execute(insert(table).values(values | {"trigger_chat_message_id": text("gen_random_uuid()")}))
    assert world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'pending' AND waits_for IS NULL") == 1


def test_a_migration_may_take_long(empty_engine: Engine) -> None:
    """A migration has no statement timeout, and waits indefinitely for a server that does not answer."""
    limits: list[tuple[str, float | None]] = []

    def look(connection: BoundedConnection, _record: object) -> None:
        (limit,) = connection.execute("SHOW statement_timeout").fetchone() or ("",)
        connection.rollback()
        limits.append((limit, connection.patience))

    event.listen(Engine, "connect", look)
    try:
        migrate(empty_engine.url.render_as_string(hide_password=False))
        with empty_engine.connect():
            pass
    finally:
        event.remove(Engine, "connect", look)
    assert limits[0] == ("0", None)
    assert limits[-1] == ("30s", 35.0)


def test_a_waiting_migration_blocks_nothing(empty_engine: Engine) -> None:
    """While a migration waits for a long transaction, other statements run; the migration then completes."""
    url = empty_engine.url.render_as_string(hide_password=False)
    migrate(url, "0003")
    migration = threading.Thread(target=migrate, args=(url,))
    with empty_engine.connect() as long, empty_engine.connect() as other:
        long.execute(text("SELECT count(*) FROM follow_ups"))
        migration.start()
        wait_until(lambda: _waiting_for_locks(other))
        other.execute(text("SET lock_timeout = '20s'"))
        # this query waits for the migration to release its lock
        other.execute(text("SELECT count(*) FROM follow_ups"))
        other.rollback()
        assert migration.is_alive()
    migration.join(30)
    current, newest = schema_versions(empty_engine)
    assert current == newest


def _waiting_for_locks(connection: Connection) -> bool:
    waiting = bool(connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")))
    connection.rollback()
    return waiting
