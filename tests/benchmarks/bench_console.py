"""Measures the console's pages on a database with five million follow-ups of a thousand workspaces.

    PYTHONPATH=tests uv run python tests/benchmarks/bench_console.py --data /tmp/console-5m

Prints the median and the slowest of seven requests for each page, in milliseconds. Filling the database takes about ten
minutes. With --data, the database is kept and used again by the next run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from console.person import Person
from followups.database import make_engine
from followups.embedded import EmbeddedPostgres, EmbeddedValkey
from followups.schema import migrate
from followups.settings import load_settings
from web import served

if TYPE_CHECKING:
    from uuid import UUID

REQUESTS = 7
SHAPES = (("workspace", 999, 50, 80), ("large", 1, 10_000, 100))
"""The kinds of workspaces in a full run: name, number of workspaces, chats per workspace, follow-ups per chat."""

CHATS = """
    INSERT INTO chats (workspace_id, id, channel, external_id, last_message_id, last_message_role, last_message_at,
                       last_user_message_at)
    SELECT w.id, gen_random_uuid(),
           CASE WHEN w.name = 'workspace 7' THEN 'instagram' ELSE (ARRAY['api', 'whatsapp', 'widget'])[1 + n %% 3] END,
           'room ' || n, gen_random_uuid(), 'agent', now(), now()
      FROM workspaces w, generate_series(1, %(chats)s) n
     WHERE w.name LIKE %(name)s || ' %%'
"""
FOLLOW_UPS = """
    INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id, created_at, status,
                            reason, finished_at, accepted_at, attempts)
    SELECT workspace_id, chat_id, 'Hello, are you still interested?',
           CASE WHEN status = 'pending' THEN now() + (random() * 30 - 0.01) * interval '1 day' ELSE at END,
           gen_random_uuid(), at - random() * interval '1 day', status,
           CASE status WHEN 'failed' THEN CASE WHEN kind < 0.9 THEN 'rejected: HTTP 403'
                                               WHEN kind < 0.9999 THEN 'retries_exhausted: HTTP 503'
                                               ELSE 'worker_lost' END
                       WHEN 'cancelled' THEN CASE WHEN kind < 0.7 THEN 'user_replied' ELSE 'human_takeover' END END,
           CASE WHEN status <> 'pending' THEN at END, CASE WHEN status = 'sent' THEN at END,
           CASE WHEN status = 'sent' THEN 1 ELSE 0 END
      FROM (SELECT c.workspace_id, c.id AS chat_id, now() - random() * interval '60 days' AS at, random() AS kind,
                   (ARRAY['sent', 'sent', 'sent', 'sent', 'sent', 'sent', 'failed', 'cancelled', 'cancelled',
                          'pending'])[1 + floor(random() * 10)::int] AS status
              FROM workspaces w JOIN chats c ON c.workspace_id = w.id, generate_series(1, %(each)s)
             WHERE w.name LIKE %(name)s || ' %%') made
"""


def fill(url: str, part: float) -> None:
    """Insert the given fraction of five million follow-ups into the database."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        for name, number, chats, each in SHAPES:
            given = {"name": name, "number": number, "chats": chats, "each": max(round(each * part), 1)}
            new = "INSERT INTO workspaces (name) SELECT %(name)s || ' ' || n FROM generate_series(1, %(number)s) n"
            for statement in (new, CHATS, FOLLOW_UPS):
                connection.execute(statement, given)
        connection.execute("VACUUM ANALYZE")


def measure(one: Person, name: str, path: str, **query: str) -> None:
    """Print how long a page takes to load."""
    took = []
    for _ in range(REQUESTS):
        begun = time.perf_counter()
        answer = one.get(path, **query)
        took.append(1000 * (time.perf_counter() - begun))
        assert answer.status_code == 200, (path, answer.status_code)
    print(f"{name:44}{statistics.median(took):8.0f}{max(took):8.0f} ms", flush=True)  # noqa: T201 - a program


def measure_all(one: Person, workspace_id: UUID, connection: psycopg.Connection) -> None:
    """Print the response time of each page with every filter."""
    query = "SELECT id, chat_id FROM follow_ups WHERE workspace_id = %s AND status = %s LIMIT 1"
    (sent, chat_id), (pending, _) = (
        connection.execute(query, (workspace_id, status)).fetchone() or ("", "") for status in ("sent", "pending")
    )
    measure(one, "Overview", "/")
    measure(one, "Follow-ups", "/follow-ups")
    for state in ("pending", "sent", "failed", "cancelled"):
        measure(one, f"Follow-ups, {state}", "/follow-ups", state=state)
    for reason in ("rejected", "user_replied", "worker_lost", "too_late"):
        measure(one, f"Follow-ups, reason {reason}", "/follow-ups", reason=reason)
    for channel in ("whatsapp", "instagram", "matrix"):
        measure(one, f"Follow-ups, channel {channel}", "/follow-ups", channel=channel)
    measure(one, "Follow-ups, pending, channel instagram", "/follow-ups", state="pending", channel="instagram")
    measure(one, "Follow-ups, due long ago", "/follow-ups", due_from="2020-01-01T00:00", due_to="2020-02-01T00:00")
    measure(one, "Follow-ups, due in the future", "/follow-ups", due_from="2100-01-01T00:00")
    measure(one, "Follow-ups, external id", "/follow-ups", id="room 7")
    measure(one, "Follow-ups, id of a chat", "/follow-ups", id=str(chat_id))
    measure(one, "Follow-ups, unknown id", "/follow-ups", id=str(workspace_id))
    measure(one, "Follow-up, sent", f"/follow-ups/{sent}")
    measure(one, "Follow-up, pending", f"/follow-ups/{pending}")
    measure(one, "New follow-up", "/follow-ups/new")
    measure(one, "Chat", f"/chats/{chat_id}")
    measure(one, "Bulk actions", "/bulk")
    measure(one, "Workspace settings", "/settings")
    measure(one, "Audit log", "/audit")


def main() -> None:
    """Measure the console with a filled database, which may be temporary or kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a directory in which the database is kept")
    parser.add_argument("--part", type=float, default=1.0, help="fill in this part of the five million only")
    given = parser.parse_args()
    with EmbeddedPostgres(given.data) as postgres, EmbeddedValkey() as valkey:
        migrate(postgres.url())
        with psycopg.connect(postgres.url()) as connection:
            if connection.execute("SELECT FROM workspaces LIMIT 1").fetchone() is None:
                fill(postgres.url(), given.part)
            settings = load_settings(
                database_url=postgres.url(), broker_url=valkey.url(), transport_url="http://127.0.0.1:9/"
            )
            engine = make_engine(postgres.url())
            workspaces = dict(connection.execute("SELECT name, id FROM workspaces").fetchall())
            shown = {"admin of a workspace of 4,000": "workspace 7", "admin of a workspace of 1,000,000": "large 1"}
            with served(settings) as (host, port):
                for who, name in (shown | {"operator": ""}).items():
                    role = "admin" if name else "operator"
                    one = Person(f"http://{host}:{port}", engine).signed_in(role, workspaces.get(name))
                    print(f"\n{who}")  # noqa: T201 - likewise
                    measure_all(one, workspaces[name or "workspace 7"], connection)
                    one.client.close()
            engine.dispose()


if __name__ == "__main__":
    main()
