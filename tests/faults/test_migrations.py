"""A migration blocked by an open transaction fails, and delays other transactions only briefly."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from alembic.script import ScriptDirectory

from databases import OWNER, url_as
from followups.errors import FollowUpsError
from followups.schema import alembic_config, downgrade, migrate, schema_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Engine

    from faults.figures import Figures
    from world import World

LONGEST_WAIT = 3.0
"""How many seconds a migration may delay any other transaction."""

REVISIONS = [one.revision for one in ScriptDirectory.from_config(alembic_config()).walk_revisions()][::-1]
OLD = REVISIONS[:-1]

READER = """
    SELECT count(*) FROM follow_ups; SELECT count(*) FROM chats; SELECT count(*) FROM chat_messages;
    SELECT count(*) FROM workspaces; SELECT count(*) FROM api_keys; SELECT count(*) FROM dispatcher_state
"""
WRITER = "UPDATE follow_ups SET updated_at = now(); UPDATE chats SET external_id = 'x'"

LAST_IN_CONFLICT = {READER: "0014", WRITER: "0014"}
"""An upgrade from this schema version, or from an older one, conflicts with the blocking transaction."""
REFUSAL = "A long transaction uses a table: end the one that followups doctor shows, and migrate again."

SHORT = (
    "SELECT 1 FROM workspaces LIMIT 1",
    "SELECT 1 FROM chats LIMIT 1",
    "SELECT 1 FROM follow_ups LIMIT 1",
    "SELECT 1 FROM chat_messages LIMIT 1",
)


class OtherTransactions(threading.Thread):
    """Repeats short transactions that read the tables changed by a migration."""

    def __init__(self, url: str, holder: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._statements = (*SHORT, f"{holder} LIMIT 1") if holder.startswith("TABLE ") else SHORT
        self._stopping = threading.Event()
        self.longest = 0.0
        self.done = 0
        self.error: psycopg.Error | None = None

    def run(self) -> None:
        with psycopg.connect(self._url, autocommit=True, options=f"-c lock_timeout={LONGEST_WAIT}s") as connection:
            while not self._stopping.wait(0.01):
                for statement in self._statements:
                    started = time.monotonic()
                    try:
                        connection.execute(statement)
                    except psycopg.Error as error:
                        self.error = error
                        return
                    self.longest = max(self.longest, time.monotonic() - started)
                self.done += 1

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def attempt(url: str, errors: list[Exception], patience: float) -> None:
    """Run the migration and store its error."""
    try:
        migrate(url_as(url, OWNER), patience=patience)
    except FollowUpsError as error:
        errors.append(error)


def beside(url: str, holder: str, patience: float, refusals: list[str]) -> OtherTransactions:
    """Migrate while a transaction holds locks; check the migration's errors; return `OtherTransactions`."""
    others = OtherTransactions(url, holder)
    others.start()
    errors: list[Any] = []
    with psycopg.connect(url) as connection:
        connection.execute(holder)
        migration = threading.Thread(target=attempt, args=(url, errors, patience), daemon=True)
        migration.start()
        migration.join(patience + 30)
        assert not migration.is_alive()
    others.stop()
    assert others.error is None
    assert [str(error) for error in errors] == refusals
    return others


def from_old_versions(
    world: World, engine: Engine, figures: Figures, cases: Sequence[tuple[str, str]], patience: float
) -> None:
    """From each version, migrate first beside a transaction that may block the migration, then without it."""
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    world.follow_up()
    longest = 0.0
    for version, holder in cases:
        downgrade(url_as(url, OWNER), version)
        refusals = [REFUSAL] if version <= LAST_IN_CONFLICT.get(holder, "0012") else []
        others = beside(url, holder, patience, refusals)
        assert others.done
        longest = max(longest, others.longest)
        migrate(url_as(url, OWNER))
        current, newest = schema_versions(engine)
        assert current == newest
    figures.keep(26, versions=len({version for version, _ in cases}), longest_wait_of_others_s=round(longest, 2))
    assert longest < LONGEST_WAIT


@pytest.mark.parametrize("version", OLD)
def test_during_an_idle_reader(world: World, engine: Engine, figures: Figures, version: str) -> None:
    """If an idle reader blocks a migration, other transactions are delayed by less than 3 s."""
    from_old_versions(world, engine, figures, [(version, READER)], patience=1)


@pytest.mark.parametrize("table", ["follow_ups", "chats", "sending_hours"])
def test_during_a_reader_of_one_table(world: World, engine: Engine, figures: Figures, table: str) -> None:
    """While a long transaction reads a table, a migration delays other transactions by less than 3 s."""
    from_old_versions(world, engine, figures, [("0008", f"TABLE {table}")], patience=1)


def test_an_index_during_a_writer(world: World, engine: Engine, figures: Figures) -> None:
    """If a writer stays open, an index build waits no longer than the migration's limit."""
    from_old_versions(world, engine, figures, [("0005", WRITER)], patience=1)


@pytest.mark.faults_long
def test_during_readers_and_writers_for_long(
    world: World, engine: Engine, figures: Figures, many_rows: Callable[[], None]
) -> None:
    """A migration of 50,000 rows with many retries delays readers and writers by less than 3 s."""
    many_rows()
    cases = [(version, holder) for version in OLD for holder in (READER, WRITER)]
    from_old_versions(world, engine, figures, cases, patience=20)


@pytest.fixture
def many_rows(world: World) -> Callable[[], None]:
    """Return a function that fills the database with many rows."""

    def fill() -> None:
        chat = world.chat()
        world.sql(
            "INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id)"
            " SELECT :workspace, :chat, 'Hello?', now() + number * interval '1 s', gen_random_uuid()"
            " FROM generate_series(1, 50000) AS number",
            workspace=world.workspace_id,
            chat=chat,
        )

    return fill
