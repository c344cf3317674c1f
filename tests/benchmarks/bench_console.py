"""Measures the console's pages with many follow-ups: ``python tests/benchmarks/bench_console.py 5000``.

Set PYTHONPATH=tests. The argument is the number of follow-ups in thousands; they are spread over a thousand workspaces.
The program prints the milliseconds for each page: the median and the slowest of seven requests.
"""

from __future__ import annotations

import statistics
import sys
import time

import psycopg

from console.person import Person
from followups.database import make_engine
from followups.embedded import EmbeddedPostgres, EmbeddedValkey
from followups.schema import migrate
from followups.settings import load_settings
from web import served

WORKSPACES = 1_000
REQUESTS = 7
FILL = (
    "SET synchronous_commit = off",
    "INSERT INTO workspaces (name) SELECT 'workspace ' || n FROM generate_series(1, 1000) n",
    """INSERT INTO chats (workspace_id, id, channel, external_id, last_message_id, last_message_role, last_message_at,
                          last_user_message_at)
       SELECT w.id, gen_random_uuid(), (ARRAY['api', 'whatsapp', 'widget'])[1 + n % 3], 'room ' || n,
              gen_random_uuid(), 'agent', now(), now()
         FROM workspaces w, generate_series(1, 50) n""",
    """INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id, created_at, status,
                               reason, finished_at, accepted_at)
       SELECT c.workspace_id, c.id, 'Hello, are you still interested?', at, gen_random_uuid(), at - interval '1 day',
              status, CASE WHEN status IN ('failed', 'cancelled') THEN 'rejected: HTTP 403' END,
              CASE WHEN status <> 'pending' THEN at END, CASE WHEN status = 'sent' THEN at END
         FROM (SELECT c.workspace_id, c.id,
                      now() + (random() * 60 - 58) * interval '1 day' AS at,
                      (ARRAY['sent', 'sent', 'sent', 'failed', 'cancelled', 'pending'])[1 + floor(random() * 6)::int]
                          AS status
                 FROM chats c, generate_series(1, %(each)s)) c""",
    "UPDATE follow_ups SET due_date = now() + random() * interval '30 days' WHERE status = 'pending'",
    "VACUUM ANALYZE",
)


def measure(one: Person, name: str, path: str, **query: str) -> None:
    """Print how long a page takes to load."""
    took = []
    for _ in range(REQUESTS):
        begun = time.perf_counter()
        answer = one.get(path, **query)
        took.append(1000 * (time.perf_counter() - begun))
        assert answer.status_code == 200, (path, answer.status_code)
    print(f"{name:44}{statistics.median(took):8.0f}{max(took):8.0f} ms")  # noqa: T201 - a program


def main() -> None:
    """Fill a separate database, and measure the pages."""
    each = int(sys.argv[1]) * 1000 // (WORKSPACES * 50)
    with EmbeddedPostgres() as postgres, EmbeddedValkey() as valkey:
        migrate(postgres.url())
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            for statement in FILL:
                begun = time.perf_counter()
                connection.execute(statement.replace("%(each)s", str(each)))
                print(f"{time.perf_counter() - begun:6.0f} s  {' '.join(statement.split())[:60]}", flush=True)  # noqa: T201 - likewise
            found = connection.execute("SELECT workspace_id, chat_id, id FROM follow_ups LIMIT 1").fetchone()
        settings = load_settings(
            database_url=postgres.url(), broker_url=valkey.url(), transport_url="http://127.0.0.1:9/"
        )
        engine = make_engine(postgres.url())
        with served(settings) as (host, port):
            assert found is not None
            for role, workspace_id in (("admin", found[0]), ("operator", None)):
                one = Person(f"http://{host}:{port}", engine).signed_in(role, workspace_id)
                print(f"\n{role}")  # noqa: T201 - likewise
                measure(one, "Overview", "/")
                measure(one, "Follow-ups", "/follow-ups")
                measure(one, "Follow-ups, pending", "/follow-ups", state="pending")
                measure(one, "Follow-ups, channel", "/follow-ups", channel="whatsapp")
                measure(
                    one, "Follow-ups, due range", "/follow-ups", due_from="2020-01-01T00:00", due_to="2020-02-01T00:00"
                )
                measure(one, "Follow-ups, external id", "/follow-ups", id="room 7")
                measure(one, "Follow-ups, any id", "/follow-ups", id=str(found[1]))
                measure(one, "Follow-up", f"/follow-ups/{found[2]}")
                measure(one, "Chat", f"/chats/{found[1]}")
                measure(one, "Workspace settings", "/settings")
                measure(one, "Audit log", "/audit")
                one.client.close()
        engine.dispose()


if __name__ == "__main__":
    main()
