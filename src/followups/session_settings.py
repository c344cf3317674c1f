"""The settings of every database session.

The server, database, role and environment cannot override these settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

CONNECT_TIMEOUT = 5
"""Seconds to wait for a connection if the URL sets no `connect_timeout`."""
TCP_USER_TIMEOUT = 10_000
"""Milliseconds without an acknowledgement after which a half-open connection is closed."""

CONNECTION: Mapping[str, str | int] = {
    "connect_timeout": CONNECT_TIMEOUT,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": TCP_USER_TIMEOUT,
    "options": "",  # no options are sent, not even those in PGOPTIONS
    # During a failover, the address may lead to a standby. A session with a standby would return outdated data and stay
    # in the pool.
    "target_session_attrs": "read-write",
}
"""libpq parameters that apply unless the URL sets them."""

SESSION: Mapping[str, str] = {
    # A statement must see everything that was committed before the statement began. With one snapshot per transaction,
    # a reply that waits for the chat's lock would miss follow-ups created meanwhile.
    "default_transaction_isolation": "read committed",
    # The following settings are the formats that psycopg reads and writes.
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "array_nulls": "on",
    "extra_float_digits": "1",
    # The lock, transaction and idle-session timeouts are off. PostgreSQL must not end a statement that waits for a row
    # lock, or an idle session in the pool. `make_engine` limits the duration of operations, and migrations set their
    # own `lock_timeout`.
    "lock_timeout": "0",
    "transaction_timeout": "0",
    "idle_session_timeout": "0",
    "plan_cache_mode": "auto",
}
"""The settings of all sessions, regardless of server, database, role or environment.

A single statement applies the settings. PgBouncer and RDS Proxy would reject settings given in the connection's
`options`.
"""

BY_KEY: Mapping[str, str] = {
    "jit": "off",
    **{f"enable_{method}": "off" for method in ("seqscan", "bitmapscan", "hashjoin", "mergejoin")},
    **{f"enable_{method}": "on" for method in ("indexscan", "indexonlyscan", "tidscan", "nestloop")},
}
"""Planner options for workers.

A worker's SQL statements look up rows by key or scan an index. A burst of inserts makes the statistics wrong, but must
not change a plan. Without these options, beginning a hundred follow-ups took 17 ms after an insert of 20,000 rows. With
these options, beginning a hundred follow-ups took 4 ms. The methods that remain are switched on, because the database's
defaults may switch them off. JIT is off because compiling a statement would take longer than
running it.
"""

ONCE_PLANNED: Mapping[str, str] = {**BY_KEY, "plan_cache_mode": "force_generic_plan"}
"""Planner options for the pipeline, whose statements always look up rows by key.

Without a cached plan, PostgreSQL makes a new plan for every batch of fewer than ten rows. With a cached plan, begin
takes 0.5 ms instead of 1.1 ms. Every claim is planned anew, because claims with different row limits may need different
plans.
"""
