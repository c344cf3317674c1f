"""Classifies database errors as temporary, caused by one row, or caused by an unusable database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

if TYPE_CHECKING:
    from sqlalchemy import Connection

READ_ONLY = "25006"
"""SQLSTATE of a write that was rejected because the server is read-only."""

READ_ONLY_SESSION = ("session is read-only", "server is in hot standby mode")
"""libpq's error messages for a server that does not match ``target_session_attrs``.

libpq's own errors have no SQLSTATE.
"""


class UnfitDatabaseError(psycopg.NotSupportedError):
    """The database cannot store some values, or it loses session state; the message names a remedy."""


PASSING_CLASSES = frozenset({"08", "25", "40", "53", "55", "57", "58"})
"""SQLSTATE classes of temporary errors (PostgreSQL, appendix A).

The classes cover lost connections, a read-only server during a failover, deadlocks, insufficient resources, objects in
use, operator intervention and system errors.
"""


def is_passing(error: Exception) -> bool:
    """Return whether a retry may help, for example after a deadlock or a lost connection."""
    cause = _cause(error)
    if isinstance(error, PoolTimeoutError) or isinstance(cause, psycopg.OperationalError):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(cause, psycopg.Error) and str(cause.sqlstate)[:2] in PASSING_CLASSES


def _cause(error: Exception) -> BaseException | None:
    """Return the driver's own error, or None if there is none.

    `followups.event_loop` uses psycopg without SQLAlchemy, so the driver's error is raised directly. A session raises
    an error of SQLAlchemy that contains the driver's error.
    """
    return error.orig if isinstance(error, DBAPIError) else error


UNDONE = frozenset({"40001", "40P01"})
"""SQLSTATEs of a transaction rolled back by a conflict: serialization failure and deadlock.

None of the transaction's changes was committed.
"""


def is_undone(error: psycopg.Error | DBAPIError) -> bool:
    """Return whether this transaction was rolled back because of a conflict with another one.

    A transaction may be retried as a whole after a conflict has rolled it back.
    """
    return getattr(_cause(error), "sqlstate", None) in UNDONE


IS_READ_ONLY = "it is read-only: wait for the failover to end, or point FOLLOWUPS_DATABASE_URL at the primary"
"""Advice for errors from a standby or a read-only server.

Processes continue without a restart once the server is writable.
"""


def is_read_only(error: Exception) -> bool:
    """Return whether the error means that the database is read-only."""
    cause = _cause(error)
    return getattr(cause, "sqlstate", None) == READ_ONLY or any(said in str(cause) for said in READ_ONLY_SESSION)


def takes_changes(connection: Connection) -> bool:
    """Return whether the server is writable.

    With ``target_session_attrs=any`` in the URL, the server may be read-only.
    """
    return bool(connection.scalar(text("SELECT current_setting('transaction_read_only') = 'off'")))


def unfit(error: Exception) -> str:
    """Return why the database cannot be used and what to do about it.

    The result is an empty string if the error does not mean that the database is unusable.
    """
    cause = _cause(error)
    if is_read_only(error):
        return IS_READ_ONLY
    return str(cause) if isinstance(cause, UnfitDatabaseError) else ""


ROW_STATES = frozenset({"P0001", "XX001", "XX002"})
"""Additional SQLSTATEs that a single row can cause: an exception from a trigger, or a damaged page.

Errors about invalid data or violated constraints also concern single rows.
"""


def concerns_a_row(error: Exception) -> bool:
    """Return whether a single row may have caused the error."""
    cause = _cause(error)
    if isinstance(cause, psycopg.DataError | psycopg.IntegrityError):
        return True
    if isinstance(cause, psycopg.Error):
        return cause.sqlstate in ROW_STATES
    return not isinstance(error, SQLAlchemyError)
