"""The settings of every database session, whatever the server, the database, the role or the environment sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

CONNECT_TIMEOUT = 5
"""Seconds until an unreachable server is reported if the URL has no `connect_timeout`."""
TCP_USER_TIMEOUT = 10_000
"""Milliseconds without an acknowledgement after which a half-open connection is given up."""

CONNECTION: Mapping[str, str | int] = {
    "connect_timeout": CONNECT_TIMEOUT,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": TCP_USER_TIMEOUT,
    "options": "",  # no options, not even those of PGOPTIONS
    # During a failover the address may lead to a standby. The standby would answer every SELECT from outdated data, and
    # the pool would keep the session.
    "target_session_attrs": "read-write",
}
"""Parameters of libpq that apply where the URL sets none."""

SESSION: Mapping[str, str] = {
    # A statement must see what was committed before it began. Under a snapshot of the whole transaction, a reply that
    # waited for the chat's lock would not see the follow-up that it has to cancel.
    "default_transaction_isolation": "read committed",
    # The formats that psycopg reads and writes.
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "array_nulls": "on",
    "extra_float_digits": "1",
    # Statements wait for rows, and sessions stay idle in the pool, by intention. The limits of `make_engine` end what
    # takes too long; migrations set a `lock_timeout` of their own.
    "lock_timeout": "0",
    "transaction_timeout": "0",
    "idle_session_timeout": "0",
    "plan_cache_mode": "auto",
}
"""Settings of all our sessions, whatever the server, the database, the role or the environment sets.

One statement sets them. They are not sent as `options` at connection startup, since PgBouncer and RDS Proxy refuse
those.
"""

BY_KEY: Mapping[str, str] = {
    "jit": "off",
    **{f"enable_{method}": "off" for method in ("seqscan", "bitmapscan", "hashjoin", "mergejoin")},
}
"""Planner options for workers. Each of their statements looks up a batch by key or walks an index, and must keep doing
so when a burst of inserts has made the table's statistics wrong. Measured right after an insert of 20,000 rows: begin
takes 17 ms a hundred without these, 4 ms with them. JIT is off because compiling would take longer than the statement.
"""

ONCE_PLANNED: Mapping[str, str] = {**BY_KEY, "plan_cache_mode": "force_generic_plan"}
"""The same for the pipeline, whose statements go by key whatever their batch holds. For a batch of fewer than ten
PostgreSQL would plan each time: begin then takes 1.1 ms, and 0.5 ms by the cached plan. A claim may need a different
plan for each of its limits.
"""
