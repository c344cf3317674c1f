"""Database sessions on servers whose default settings differ from PostgreSQL's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import NotSupportedError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

import followups
from databases import drop_database
from followups.database import make_async_engine, make_engine
from followups.errors import TransactionError
from followups.session_settings import BY_KEY, CONNECT_TIMEOUT, ONCE_PLANNED, SESSION
from followups.transactions import in_loop
from foreign import HOSTILE, create_database_of_encoding, set_defaults
from pgbouncer import MISSING, PROGRAM, PgBouncer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.models import FollowUp
    from world import World


def settings_of(engine: Engine, *names: str) -> dict[str, str]:
    """Return the values that a session has for the named settings, by default for those in `SESSION`."""
    query = text("SELECT name, current_setting(name, true) FROM unnest(CAST(:names AS text[])) AS wanted (name)")
    with engine.connect() as connection:
        rows = connection.execute(query, {"names": list(names or SESSION)})
        return {row[0]: row[1] for row in rows if row[1] is not None}


class TestSettings:
    """Tests of the settings that are applied to every database session."""

    def test_settings_override_all_defaults(self, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The session settings take precedence over role and database defaults, the URL and the environment."""
        set_defaults(database_url, HOSTILE)
        for name, value in {"PGTZ": "Asia/Kolkata", "PGDATESTYLE": "German", "PGCLIENTENCODING": "LATIN1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PGOPTIONS", "-c default_transaction_read_only=on")
        own = quote("-c IntervalStyle=iso_8601 -c application_name=theirs -c search_path=pg_catalog,public")
        engine = make_engine(f"{database_url}&options={own}", pool_size=1)
        found = settings_of(engine)
        assert found == {name: value for name, value in SESSION.items() if name in found}
        assert found.keys() >= SESSION.keys() - {"transaction_timeout"}  # older servers lack this setting
        other = settings_of(engine, "transaction_isolation", "search_path", "transaction_read_only", "application_name")
        assert other == {
            "transaction_isolation": "read committed",
            "search_path": "pg_catalog,public",
            "transaction_read_only": "off",
            "application_name": "followups",
        }
        engine.dispose()

    async def test_values(self, database_url: str) -> None:
        """Under any server settings, times, intervals, numbers, strings and arrays are read back as written."""
        set_defaults(database_url, HOSTILE)
        values: dict[str, object] = {
            "moment": datetime(2030, 1, 31, 9, 0, 0, 1, tzinfo=UTC),
            "span": timedelta(days=40, seconds=1.5),
            "number": 0.1 + 0.2,
            "words": "\N{WAVING HAND SIGN} \\ 'é'",
            "some": [1, None, 3],
        }
        query = text("""
            SELECT CAST(:moment AS timestamptz) AS moment, CAST(:span AS interval) AS span,
                   CAST(:number AS double precision) AS number, CAST(:words AS text) AS words,
                   CAST(:some AS int[]) AS some
        """)

        def returned(engine: Engine) -> dict[str, object]:
            with engine.connect() as connection:
                return dict(connection.execute(query, values).mappings().one())

        engine, in_a_loop = make_engine(database_url), make_async_engine(database_url)
        for found in (returned(engine), await in_loop(in_a_loop, returned)):
            assert found == values
            assert str(found["moment"]) == "2030-01-31 09:00:00.000001+00:00"
        engine.dispose()
        await in_a_loop.dispose()

    async def test_settings_of_an_event_loop(self, database_url: str) -> None:
        """Sessions opened by an event loop have the common settings and the pipeline's options."""
        set_defaults(database_url, HOSTILE)
        engine = make_async_engine(database_url, pool_size=1, options=ONCE_PLANNED)
        found = await in_loop(engine, settings_of)
        assert found == {name: value for name, value in {**SESSION, **ONCE_PLANNED}.items() if name in found}
        assert await in_loop(engine, settings_of, *BY_KEY) == dict(BY_KEY)
        await engine.dispose()

    def test_limits(self, database_url: str) -> None:
        """An engine's time limit, if any, applies to statements and to idle transactions."""
        set_defaults(database_url, {"statement_timeout": "1h", "idle_in_transaction_session_timeout": "1h"})
        for limit, shown in ((timedelta(seconds=7), "7s"), (None, "0")):
            engine = make_engine(database_url, pool_size=1, statement_timeout=limit)
            assert set(settings_of(engine, "statement_timeout", "idle_in_transaction_session_timeout").values()) == {
                shown
            }
            engine.dispose()

    async def test_through_pgbouncer(self, database_url: str, pgbouncer: PgBouncer) -> None:
        """Through PgBouncer in session mode, sessions get the settings without startup `options`."""
        set_defaults(database_url, HOSTILE)
        engine = make_engine(pgbouncer.url(), pool_size=1, options=BY_KEY)
        found = settings_of(engine, *SESSION, *BY_KEY)
        assert found == {name: value for name, value in {**SESSION, **BY_KEY}.items() if name in found}
        engine.dispose()
        in_a_loop = make_async_engine(pgbouncer.url(), pool_size=1)
        assert (await in_loop(in_a_loop, settings_of))["default_transaction_isolation"] == "read committed"
        await in_a_loop.dispose()


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
class TestPoolers:
    """Poolers that may run each transaction of a connection in a different session."""

    @pytest.mark.parametrize("busy", [False, True])
    async def test_transaction_pooling_is_refused(self, database_url: str, *, busy: bool) -> None:
        """Connections through an idle or busy transaction-mode pooler are rejected with advice."""
        with PgBouncer(database_url, pool_mode="transaction") as pooler, ExitStack() as load:
            if busy:
                stopping = threading.Event()
                pool = load.enter_context(ThreadPoolExecutor())
                load.callback(stopping.set)
                for _ in range(4):
                    pool.submit(keep_busy, pooler.url(), stopping)
            for _ in range(3):
                engine, in_a_loop = make_engine(pooler.url()), make_async_engine(pooler.url())
                with pytest.raises(NotSupportedError, match="use session pooling"):
                    engine.connect()
                with pytest.raises(NotSupportedError, match="use session pooling"):
                    await in_loop(in_a_loop, settings_of)
                engine.dispose()
                await in_a_loop.dispose()

    def test_a_pooler_with_one_session(self, database_url: str) -> None:
        """If a pooler has only one session, an engine still checks the pooler within the timeout."""
        with PgBouncer(database_url, pool_size=1) as pooler:
            engine = make_engine(f"{pooler.url()}?connect_timeout=2", pool_size=1)
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT 1")) == 1
            engine.dispose()


def keep_busy(url: str, stopping: threading.Event) -> None:
    """Run short transactions continuously."""
    with psycopg.connect(url, prepare_threshold=None) as connection:
        while not stopping.is_set():
            connection.execute("SELECT 1")
            connection.commit()


class TestEncoding:
    """The encoding of a database must be able to store any text."""

    @pytest.fixture(params=["LATIN1", "SQL_ASCII"])
    def other(self, postgres_url: str, request: pytest.FixtureRequest) -> Iterator[str]:
        """Return the URL of an empty database with another encoding."""
        name = f"test_{uuid4().hex}"
        try:
            yield create_database_of_encoding(postgres_url, name, request.param)
        finally:
            drop_database(postgres_url, name)

    async def test_another_encoding_is_refused(self, other: str) -> None:
        """If a database's encoding is not UTF-8, connections to it are refused, with advice in the error."""
        engine, in_a_loop = make_engine(other), make_async_engine(other)
        refused = (
            "its encoding is (LATIN1|SQL_ASCII), which cannot store every text: create a database with ENCODING 'UTF8'"
        )
        with pytest.raises(NotSupportedError, match=refused):
            engine.connect()
        with pytest.raises(NotSupportedError, match=refused):
            await in_loop(in_a_loop, settings_of)
        engine.dispose()
        await in_a_loop.dispose()


class TestConnectionParameters:
    """Connection parameters in the URL override the project's defaults."""

    def test_connect_timeout_of_the_url(self, database_url: str) -> None:
        """Timeouts in the database URL are kept, and the pool's timeout exceeds the connect timeout."""
        engine = make_engine(f"{database_url}&connect_timeout=30&keepalives_idle=77&tcp_user_timeout=99000")
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            given = driver.info.get_parameters()
        assert (given["connect_timeout"], given["keepalives_idle"], given["tcp_user_timeout"]) == ("30", "77", "99000")
        assert (given["keepalives_interval"], given["keepalives_count"]) == ("3", "3")
        assert pool_timeout(engine) > 30
        engine.dispose()

    @pytest.mark.parametrize(("said", "seconds"), [("", CONNECT_TIMEOUT), ("&connect_timeout=0", 120)])
    def test_default_connect_timeout(self, database_url: str, said: str, seconds: float) -> None:
        """A URL without a connect timeout gets the default timeout.

        If the URL disables the connect timeout, the pool waits longer than the driver.
        """
        engine = make_engine(database_url + said)
        assert pool_timeout(engine) > seconds
        engine.dispose()

    @pytest.mark.skipif(PROGRAM is None, reason=MISSING)
    async def test_a_silent_server(self, database_url: str) -> None:
        """A server that accepts a connection but stays silent counts as unreachable after the timeout."""
        with PgBouncer(database_url, pool_size=1) as pooler, psycopg.connect(pooler.url()) as other:
            other.execute("SELECT 1")  # occupies the pooler's only session until `other` is closed
            url = f"{pooler.url()}?connect_timeout=2"
            engine, in_a_loop = make_engine(url, statement_timeout=None), make_async_engine(url)
            with pytest.raises(OperationalError, match="the server was silent for 2 s"):
                engine.connect()
            with pytest.raises(OperationalError, match="the server was silent for 2 s"):
                await in_loop(in_a_loop, settings_of)
            other.close()
            assert settings_of(engine, "DateStyle") == {"DateStyle": "ISO, MDY"}
            engine.dispose()
            await in_a_loop.dispose()


def pool_timeout(engine: Engine) -> float:
    """Return how many seconds a caller waits for a connection from the pool."""
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.timeout()


class TestCallersOwnSession:
    """Tests of `schedule` and `cancel` in a caller's transaction."""

    @pytest.fixture(params=["theirs", "ours"])
    def base(self, request: pytest.FixtureRequest, world: World, database_url: str) -> Iterator[Engine]:
        """Return a caller's own engine or the project's engine, depending on the parameter."""
        if request.param == "ours":
            yield world.engine
            return
        engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
        yield engine
        engine.dispose()

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
    def test_another_isolation_is_refused(self, base: Engine, world: World, level: Any) -> None:
        """`schedule` and `cancel` reject AUTOCOMMIT and levels above READ COMMITTED, and name the remedy.

        At a stricter isolation level, a transaction reads from an old snapshot.
        """
        chat, planned = world.chat(), world.follow_up(due=timedelta(days=1))
        with Session(base.execution_options(isolation_level=level)) as session:
            for ask in (
                lambda: schedule(session, world, chat),
                lambda: followups.cancel(session, planned, reason="enough"),
            ):
                with pytest.raises(TransactionError, match=f"is at {level}, and followups needs READ COMMITTED"):
                    ask()
            session.commit()
        assert [(row.id, row.status) for row in world.rows()] == [(planned, "pending")]

    @pytest.mark.parametrize("level", ["READ COMMITTED", "READ UNCOMMITTED"])
    def test_read_committed_is_accepted(self, base: Engine, world: World, database_url: str, level: Any) -> None:
        """If the caller selects READ COMMITTED, `schedule` and `cancel` work, whatever the server's default."""
        set_defaults(database_url, {"default_transaction_isolation": "serializable"})
        chat, planned = world.chat(), world.follow_up(due=timedelta(days=1))
        with Session(base) as session:
            session.connection(execution_options={"isolation_level": level})
            scheduled = schedule(session, world, chat).id
            followups.cancel(session, planned, reason="enough")
            session.commit()
        assert {row.id: row.status for row in world.rows()} == {planned: "cancelled", scheduled: "pending"}

    def test_a_default_of_the_server(self, world: World, database_url: str) -> None:
        """If the server's default isolation level is stricter than READ COMMITTED, scheduling is refused."""
        set_defaults(database_url, {"default_transaction_isolation": "serializable"})
        engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
        with Session(engine) as session, pytest.raises(TransactionError, match="SERIALIZABLE"):
            schedule(session, world, world.chat())
        engine.dispose()


def schedule(session: Session, world: World, chat_id: UUID) -> FollowUp:
    """Schedule a follow-up for tomorrow."""
    due = datetime.now(UTC) + timedelta(days=1)
    return followups.schedule(session, workspace_id=world.workspace_id, chat_id=chat_id, message="?", due_date=due)
