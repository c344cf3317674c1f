"""What ``followups doctor`` finds unusual in the server's settings and in a pooler in front of it.

Usual settings yield no finding. A finding without advice is only information; one with advice needs to be fixed now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from followups.cli.doctor.checks import Finding
from followups.database import make_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings

# The values for a session without settings of its own, since our sessions set some of these.
_DEFAULTS = text("""
    SELECT name, reset_val FROM pg_settings
     WHERE name IN ('default_transaction_isolation', 'synchronous_commit', 'synchronous_standby_names')
""")
_BACKEND = text("SELECT pg_backend_pid()")


def of_server(settings: Settings, engine: Engine) -> Iterator[Finding]:
    """Check the settings of the server, the database and the role.

    Yields nothing if the database does not answer.
    """
    try:
        with engine.connect() as connection:
            defaults: dict[str, str] = {row.name: row.reset_val for row in connection.execute(_DEFAULTS)}
            yield from isolation(defaults["default_transaction_isolation"])
            yield from durability(defaults["synchronous_commit"], defaults["synchronous_standby_names"])
            yield from _pooling(settings, connection)
    except SQLAlchemyError:
        return  # another check has said so


def isolation(level: str) -> Iterator[Finding]:
    """Report a default isolation level other than PostgreSQL's own.

    The default applies to the callers of `followups.schedule`.
    """
    if level != "read committed":
        own = "this service's sessions are READ COMMITTED all the same; a caller of followups.schedule needs it too"
        yield Finding("isolation", f"default_transaction_isolation is {level}; {own}")


def durability(commit: str, standbys: str) -> Iterator[Finding]:
    """Report a `synchronous_commit` with which a crash or a failover loses acknowledged transactions.

    `local` is enough if no standby is synchronous. `remote_write` loses transactions only if both machines crash.
    """
    if commit == "off" or (commit == "local" and standbys):
        event = "crash" if commit == "off" else "failover"
        detail = f"synchronous_commit is {commit}: a {event} may forget an acknowledged cancel and repeat a send"
        yield Finding("durability", detail, "Set synchronous_commit to on for this database, then restart all.")


def _pooling(settings: Settings, connection: Connection) -> Iterator[Finding]:
    """Report a pooler that gives each transaction another session.

    It is detected by two simultaneous connections that have the same session.
    """
    first = connection.execute(_BACKEND).scalar_one()
    connection.commit()
    other = make_engine(settings.database_url.get_secret_value(), pool_size=1, application_name="followups-cli")
    try:
        with other.connect() as second:
            if second.execute(_BACKEND).scalar_one() == first:
                detail = "a pooler before the database gives each transaction another session (transaction pooling)"
                yield Finding("pooler", detail, "Use session pooling (PgBouncer: pool_mode = session).")
    finally:
        other.dispose()
