"""What ``followups doctor`` finds of the server's settings and of a pooler before it: nothing, where they are usual.

What only has to be known is told in the detail; a finding with advice is something to be mended now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from followups.cli.checks import Finding
from followups.database import make_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings

# What a session without a setting of its own would have: our sessions set some of these.
_DEFAULTS = text("""
    SELECT name, reset_val FROM pg_settings
     WHERE name IN ('default_transaction_isolation', 'synchronous_commit', 'synchronous_standby_names')
""")
_BACKEND = text("SELECT pg_backend_pid()")


def of_server(settings: Settings, engine: Engine) -> Iterator[Finding]:
    """Look at what the server, the database and the role say. Nothing, when the database does not answer."""
    try:
        with engine.connect() as connection:
            defaults: dict[str, str] = {row.name: row.reset_val for row in connection.execute(_DEFAULTS)}
            yield from isolation(defaults["default_transaction_isolation"])
            yield from durability(defaults["synchronous_commit"], defaults["synchronous_standby_names"])
            yield from _pooling(settings, connection)
    except SQLAlchemyError:
        return  # another check has said so


def isolation(level: str) -> Iterator[Finding]:
    """Show a default that is not PostgreSQL's own: it counts for the callers of `followups.schedule`."""
    if level != "read committed":
        own = "this service's sessions are READ COMMITTED all the same; a caller of followups.schedule needs it too"
        yield Finding("isolation", f"default_transaction_isolation is {level}; {own}")


def durability(commit: str, standbys: str) -> Iterator[Finding]:
    """Find a `synchronous_commit` with which a crash or a failover forgets what was acknowledged.

    `local` is enough where no standby is synchronous. `remote_write` loses something only when both machines crash.
    """
    if commit == "off" or (commit == "local" and standbys):
        event = "crash" if commit == "off" else "failover"
        detail = f"synchronous_commit is {commit}: a {event} may forget an acknowledged cancel and repeat a send"
        yield Finding("durability", detail, "Set synchronous_commit to on for this database, then restart all.")


def _pooling(settings: Settings, connection: Connection) -> Iterator[Finding]:
    """Notice a pooler that gives each transaction another session: two connections at once have the same one."""
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
