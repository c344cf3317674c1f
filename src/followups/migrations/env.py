"""Run migrations over a database connection, in one process at a time."""

from __future__ import annotations

import time

from alembic import context
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import OperationalError

from followups.database import make_engine
from followups.errors import FollowUpsError
from followups.models import Base
from followups.schema import PATIENCE, WAIT
from followups.settings import get_settings

LOCK = 0x666F6C6C6F777570
"""Key of the advisory lock that keeps migrations from running concurrently ("followup" in ASCII)."""

ASK_AGAIN = 0.2
"""Seconds between two attempts to acquire the lock while another migration is running."""

LOCK_TIMEOUT = "2s"
"""How long a change to a table waits for the table's lock.

While a change to a table waits for its lock, other transactions on the table wait too. A migration therefore delays
other transactions by less than three seconds.
"""

GIVE_WAY = 1.0
"""Seconds between two attempts to change a table. During this pause, transactions that wait for the table can proceed.
"""

# The advisory lock's key is part of the SQL text, not a parameter. After a statement with parameters, PostgreSQL keeps
# the snapshot until the next statement. A concurrent index build would wait until that snapshot is released.
_TRY_LOCK = text(f"SELECT pg_try_advisory_xact_lock({LOCK})")
_HOLDER = text("""
    SELECT a.pid, a.application_name, a.state, date_trunc('second', now() - a.state_change) AS since
      FROM pg_locks l JOIN pg_stat_activity a USING (pid)
     WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND a.datname = current_database()
       AND CAST(l.classid AS bigint) << 32 | CAST(l.objid AS bigint) = :key
""")


def _bound_locks(connection: Connection) -> None:
    # Each transaction sets the timeout anew, because an earlier transaction may have changed it. A concurrent index
    # build runs outside a transaction. It blocks no queries, so it needs no short lock timeout.
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")


def _lock(connection: Connection, wait: float) -> None:
    """Lock out other migrations until the transaction ends.

    Raises `FollowUpsError` if the lock is not acquired within ``wait`` seconds. The lock lasts for the transaction, not
    the session: behind a pooler, a session outlives its client. This function polls for the lock instead of waiting in
    a statement. A concurrent index build waits for every running statement. A statement that waited for the lock would
    therefore block a concurrent index build.
    """
    deadline = time.monotonic() + wait
    while not connection.scalar(_TRY_LOCK):
        if time.monotonic() >= deadline:
            raise FollowUpsError(_who_migrates(connection, wait))
        connection.rollback()
        time.sleep(ASK_AGAIN)


def _who_migrates(connection: Connection, wait: float) -> str:
    holder = connection.execute(_HOLDER, {"key": LOCK}).first()
    if holder is None:
        return f"Another migration held the lock for {wait:g} s and has just ended: run followups migrate again."
    return (
        f"Another migration holds the lock: backend {holder.pid} ({holder.application_name or 'unnamed'},"
        f" {holder.state} for {holder.since}). Wait for it (--wait SECONDS); or, if no migration runs any more,"
        f" end it: SELECT pg_terminate_backend({holder.pid})."
    )


def _migrate(engine: Engine, patience: float) -> None:
    """Migrate; raise `FollowUpsError` if a lock is not available within ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            _try_to_migrate(engine)
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
            if time.monotonic() >= deadline:
                message = "A long transaction uses a table: end the one that followups doctor shows, and migrate again."
                raise FollowUpsError(message) from error
            time.sleep(GIVE_WAY)
        else:
            return


def _try_to_migrate(engine: Engine) -> None:
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()


def run() -> None:
    """Migrate the database that the caller passes, or the configured one."""
    attributes = context.config.attributes
    url = attributes.get("database_url") or get_settings().database_url.get_secret_value()
    patience = attributes.get("patience", PATIENCE)
    # Changing a large table has no time limit, but waiting for a lock has one.
    options = {"lock_timeout": f"{max(patience, 1):.0f}s"}
    engine = make_engine(url, statement_timeout=None, options=options)
    event.listen(engine, "begin", _bound_locks)
    try:
        with engine.connect() as lock:
            _lock(lock, attributes.get("wait", WAIT))
            _migrate(engine, patience)
    finally:
        engine.dispose()


run()
