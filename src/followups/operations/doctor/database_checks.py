"""Checks of the database: version and schema, settings, load, recent failures, and rows that other programs broke."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import TYPE_CHECKING

from sqlalchemy import CheckConstraint, text
from sqlalchemy.exc import SQLAlchemyError

from followups import schema
from followups.database_errors import IS_READ_ONLY, takes_changes, unfit
from followups.errors import reason_of
from followups.models import Base
from followups.operations.doctor import Finding
from followups.store import counts, external_ids, last_tick, pauses
from followups.urls import place_of
from followups.wording import span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings
    from followups.store.external_ids import SharingChat


OLDEST_POSTGRESQL = 14

LONG_TRANSACTION = timedelta(minutes=10)
"""Age from which an open transaction is reported.

This system's own transactions take milliseconds. A long transaction prevents PostgreSQL from removing dead rows. Dead
rows slow the claim.
"""

CLOCK_OFF = timedelta(seconds=1)

LATEST = 10_000
"""Only this many of the newest failed attempts are examined.

Examining all failed attempts could take too long.
"""

_ATTEMPTS = text(f"""
    SELECT outcome, count(*) AS number
      FROM (SELECT outcome, at FROM failed_attempts ORDER BY id DESC LIMIT {LATEST}) AS latest
     WHERE at > now() - interval '1 hour'
     GROUP BY outcome ORDER BY outcome
""")  # noqa: S608 - no input, only the constant above
REFUSALS = 5
"""After this many refused attempts without a sent message in between, the secret may have expired."""

_REFUSES_ALL = text("""
    WITH newest AS MATERIALIZED (SELECT status_code, at FROM failed_attempts ORDER BY id DESC LIMIT :refusals),
         refused AS MATERIALIZED (
             SELECT count(*) FILTER (WHERE status_code IN (401, 403)) AS number, min(at) AS since FROM newest
              WHERE at > now() - interval '1 hour'
         )
    SELECT number = :refusals
           AND NOT EXISTS (SELECT FROM follow_ups WHERE finished_at >= refused.since AND status = 'sent')
      FROM refused
""")
_OLDEST_TRANSACTION = text("""
    SELECT pid, application_name, now() - xact_start AS age FROM pg_stat_activity
     WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()
       AND backend_type = 'client backend'
     ORDER BY xact_start LIMIT 1
""")
_ROLE_WITHOUT_SIGHT = text("""
    SELECT current_user FROM pg_stat_activity
     WHERE datname = current_database() AND query = '<insufficient privilege>' LIMIT 1
""")
_DEAD = text("""
    SELECT n_dead_tup AS dead, n_live_tup AS live FROM pg_stat_user_tables WHERE relid = 'follow_ups'::regclass
""")

EXPLAINED = {
    "lost": "lost with their workers (look for crashes, and for the kernel's OOM killer)",
    "unknown": "without an answer (check the network to the transport, and its timeout)",
    "retry": "refused for now",
    "snoozed": "deferred by a rate limit, or after a 401 or 403",
    "rejected": "refused for good",
}
"""The meaning of each outcome of a failed attempt."""
# The query reads the server's default settings. The service's own sessions override some of these settings.
_DEFAULTS = text("""
    SELECT name, reset_val FROM pg_settings
     WHERE name IN ('default_transaction_isolation', 'synchronous_commit', 'synchronous_standby_names')
""")


def databases(settings: Settings, engine: Engine) -> Iterator[Finding]:
    """Check the database, its schema, and the age of the last recorded tick."""
    place = place_of(settings.database_url.get_secret_value())
    try:
        with engine.connect() as connection:
            yield _version(connection, place) if takes_changes(connection) else _unusable(place, IS_READ_ONLY)
        current, newest = schema.schema_versions(engine)
        yield _migrations(current, newest)
        if current is not None:
            with engine.connect() as connection:
                yield _tick(settings, last_tick.last_tick_age(connection))
    except SQLAlchemyError as error:
        reason = reason_of(getattr(error, "orig", None) or error)
        yield _unusable(place, unfit(error) or f"{reason}: start it, or correct FOLLOWUPS_DATABASE_URL")


def _unusable(place: str, said: str) -> Finding:
    detail, _, advice = said.rpartition(": ")
    return Finding("database", f"{place}: {detail}", f"{advice[:1].upper()}{advice[1:]}.")


def _version(connection: Connection, place: str) -> Finding:
    number = connection.execute(text("SELECT current_setting('server_version_num')::int / 10000")).scalar_one()
    detail = f"PostgreSQL {number}, {place}"
    advice = "" if number >= OLDEST_POSTGRESQL else f"Use PostgreSQL {OLDEST_POSTGRESQL} or newer."
    return Finding("database", detail, advice)


def _migrations(current: str | None, newest: str | None) -> Finding:
    if current == newest:
        return Finding("migrations", f"{current}, the newest")
    if schema.is_ready(current):
        return Finding("migrations", f"{current}, made by a newer version than this one, which knows {newest}")
    return Finding("migrations", f"{current or 'none'}; the newest is {newest}", "Run followups migrate.")


def _tick(settings: Settings, age: timedelta | None) -> Finding:
    limit = last_tick.stale_after(settings.tick_interval)
    detail = f"the last tick ran {span(age)} ago" if age is not None else "no tick has ever run"
    if age is not None and age <= limit:
        return Finding("ticks", f"{detail} (every {span(settings.tick_interval)})")
    advice = "Start beat and a worker: honcho start beat worker, or another Procfile runner."
    return Finding("ticks", f"{detail}; one is due every {span(settings.tick_interval)}", advice)


def of_server(engine: Engine) -> Iterator[Finding]:
    """Check the settings of the server, the database and the role.

    Yields nothing if the database does not answer.
    """
    try:
        with engine.connect() as connection:
            defaults: dict[str, str] = {row.name: row.reset_val for row in connection.execute(_DEFAULTS)}
            yield from isolation(defaults["default_transaction_isolation"])
            yield from durability(defaults["synchronous_commit"], defaults["synchronous_standby_names"])
    except SQLAlchemyError:
        return  # the finding `database` already reports that the database does not answer


def isolation(level: str) -> Iterator[Finding]:
    """Report a default isolation level other than READ COMMITTED, PostgreSQL's own default.

    The default isolation level affects programs that call `followups.schedule`.
    """
    if level != "read committed":
        own = "this service's sessions use READ COMMITTED anyway; callers of followups.schedule must use it too"
        yield Finding("isolation", f"default_transaction_isolation is {level}; {own}")


def durability(commit: str, standbys: str) -> Iterator[Finding]:
    """Report a `synchronous_commit` setting that can lose acknowledged transactions in a crash or failover.

    Without a synchronous standby, `local` is sufficient. With `remote_write`, transactions are lost only if both
    machines crash at the same time.
    """
    if commit == "off" or (commit == "local" and standbys):
        event = "crash" if commit == "off" else "failover"
        detail = f"synchronous_commit is {commit}: a {event} may lose an acknowledged cancel and repeat a send"
        yield Finding(
            "durability", detail, "Set synchronous_commit to on for this database, then restart all processes."
        )


def of_database(settings: Settings, engine: Engine) -> Iterator[Finding]:
    """Check the waiting follow-ups, recent failures, and possible causes of a slow database.

    Yields nothing if the database is unreachable or read-only.
    """
    try:
        with engine.connect() as connection:
            if not takes_changes(connection):
                return  # another check reports that the database is read-only; more workers would not help then
            yield _backlog(settings, counts.measure_backlog(connection, window=settings.max_in_flight))
            yield _attempts(connection)
            yield _held(connection)
            yield _transactions(connection)
            yield _clock(connection)
    except SQLAlchemyError:
        return  # another check reports this problem


def _backlog(settings: Settings, found: counts.Backlog) -> Finding:
    oldest = timedelta(seconds=found.oldest_overdue)
    detail = f"{found.pending} pending, {found.in_flight} in flight, {found.overdue} overdue"
    detail += f", the oldest by {span(oldest)}" if found.overdue else ""
    if oldest <= settings.lease + settings.tick_interval:
        return Finding("backlog", detail)
    advice = (
        "Fewer follow-ups are sent than fall due: see followups stats and the transport's answers; start more workers."
    )
    return Finding("backlog", detail, advice)


def _attempts(connection: Connection) -> Finding:
    rows = connection.execute(_ATTEMPTS).all()
    told = ", ".join(f"{row.number} {EXPLAINED.get(row.outcome, row.outcome)}" for row in rows)
    detail = f"failed in the last hour: {told or 'none'}"
    if not connection.scalar(_REFUSES_ALL, {"refusals": REFUSALS}):
        return Finding("attempts", detail)
    advice = (
        f"The chat server has refused the last {REFUSALS} messages with 401 or 403, and no message has been sent since."
        " If its log mentions the key or the signature, replace FOLLOWUPS_TRANSPORT_SECRET or correct the chat server's"
        " keys, restart the workers, and run followups retry --failed --since 1d --reason rejected."
    )
    return Finding("attempts", detail, advice)


def _held(connection: Connection) -> Finding:
    standing = pauses.standing(connection)
    if not standing:
        return Finding("pauses", "nothing is paused")
    held = sum(each.held for each in standing)
    return Finding("pauses", f"{len(standing)}, which hold {held}: followups pause --list")


def _transactions(connection: Connection) -> Finding:
    dead = connection.execute(_DEAD).one()
    rows = f"{dead.dead} dead rows beside {dead.live}"
    oldest = connection.execute(_OLDEST_TRANSACTION).one_or_none()
    if oldest is None or oldest.age < LONG_TRANSACTION:
        return Finding("transactions", f"none open for long, {rows}{_hidden(connection)}")
    detail = f"one is open for {span(oldest.age)} (pid {oldest.pid}, {oldest.application_name or 'no name'}), {rows}"
    return Finding(
        "transactions",
        detail,
        f"The transaction keeps dead rows from being removed. End it: SELECT pg_terminate_backend({oldest.pid}).",
    )


def _hidden(connection: Connection) -> str:
    role = connection.scalar(_ROLE_WITHOUT_SIGHT)
    return f"; those of other roles are hidden (GRANT pg_read_all_stats TO {role} shows them)" if role else ""


def _clock(connection: Connection) -> Finding:
    before = datetime.now(UTC)
    theirs: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    off = before + (datetime.now(UTC) - before) / 2 - theirs
    if abs(off) <= CLOCK_OFF:
        return Finding("clock", "this host's clock agrees with the database's clock")
    where = "ahead of" if off > timedelta(0) else "behind"
    detail = f"this host's clock is {span(abs(off))} {where} the database's clock, by which follow-ups are sent"
    return Finding("clock", detail, "Correct this host's clock: the times in its logs are wrong.")


def of_rooms(settings: Settings, engine: Engine) -> Iterator[Finding]:
    """Find Matrix rooms that chats of several workspaces share.

    Yields nothing if several workspaces may use the same external id.
    """
    if not settings.exclusive_external_ids:
        return
    try:
        with engine.connect() as connection:
            yield _rooms(external_ids.sharing(connection, SHOWN))
    except SQLAlchemyError as error:
        reason = reason_of(getattr(error, "orig", None) or error)
        yield Finding("rooms", f"not checked: {reason}", "Repair the database first.")


def _rooms(sharing: Sequence[SharingChat]) -> Finding:
    if not sharing:
        return Finding("rooms", "no Matrix room is shared by several workspaces")
    rooms = [
        f"{room} (chat {', chat '.join(f'{chat.chat_id} of {chat.workspace}' for chat in chats)})"
        for room, chats in groupby(sharing, lambda chat: chat.room)
    ]
    more = " ..." if len(rooms) == SHOWN else ""
    detail = f"several workspaces share a Matrix room, so messages to it are rejected: {'; '.join(rooms)}{more}"
    advice = (
        "Decide which workspace owns the room. In the other workspaces, remove the chat or change its externalId"
        " (DELETE or PUT /api/v1/chats/ID), or run followups chat delete ID --workspace NAME. Then run followups retry"
        " for the rejected follow-ups."
    )
    return Finding("rooms", detail, advice)


_VALID = text(
    "SELECT conname FROM pg_constraint WHERE contype = 'c' AND convalidated AND conrelid = to_regclass(:name)"
)
_BEHIND = text("""
    SELECT COALESCE(max(id), 0) > COALESCE(pg_sequence_last_value(pg_get_serial_sequence('failed_attempts', 'id')), 0)
      FROM failed_attempts
""")
RUN = "run as the tables' owner"
SHOWN = 3
"""Maximum number of rows, of rooms, or of chats with the same room, that a finding names."""


def of_tables(engine: Engine) -> Iterator[Finding]:
    """Find rows that cannot be read, and sequences whose next id is already in use.

    Yields nothing if no problem is found.
    """
    try:
        with engine.connect() as connection:
            for table, name, condition in _checks():
                if name not in set(connection.scalars(_VALID, {"name": table})):
                    yield _unguarded(connection, table, name, condition)
            if connection.scalar(_BEHIND):
                yield _behind()
    except SQLAlchemyError:
        return  # another check reports this problem


def _checks() -> Iterator[tuple[str, str, str]]:
    for table in Base.metadata.sorted_tables:
        for constraint in table.constraints:
            if isinstance(constraint, CheckConstraint):
                yield table.name, str(constraint.name), str(constraint.sqltext)


def _unguarded(connection: Connection, table: str, name: str, condition: str) -> Finding:
    """Return a finding about a missing constraint: which rows violate it, and how to restore it."""
    keys = ", ".join(f"{column.name}::text" for column in Base.metadata.tables[table].primary_key)
    query = text(f"SELECT concat_ws(' ', {keys}) FROM {table} WHERE NOT ({condition}) LIMIT {SHOWN}")  # noqa: S608 - no input
    rows = list(connection.scalars(query))
    detail = f"{table} has no valid constraint {name}"
    add = (
        f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID;"
        f" ALTER TABLE {table} VALIDATE CONSTRAINT {name}"
    )
    if rows:
        found = f"{detail}; rows that break it: {', '.join(rows)}{' ...' if len(rows) == SHOWN else ''}"
        return Finding("rows", found, f"Correct these rows, which may never be sent. Then {RUN}: {add}")
    return Finding("rows", detail, f"{RUN.capitalize()}: {add}")


def _behind() -> Finding:
    detail = "the next ids of failed_attempts are already in use, as after a logical replication or a restore"
    advice = "SELECT setval(pg_get_serial_sequence('failed_attempts', 'id'), max(id)) FROM failed_attempts"
    return Finding("ids", detail, f"Failed attempts are not recorded. {RUN.capitalize()}: {advice}")
