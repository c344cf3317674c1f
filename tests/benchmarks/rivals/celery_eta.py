"""Celery with ETAs: a task for each row waits in a worker's memory."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import psycopg

from rivals.celery_rows import app, deliver
from rivals.place import DATABASE

__all__ = ["app"]


def publish() -> None:
    """Publish a task for every pending row."""
    with psycopg.connect(DATABASE) as connection:
        rows = connection.execute("SELECT id, due_date FROM bench_rows WHERE status = 'pending'").fetchall()
        connection.execute("UPDATE bench_rows SET status = 'queued' WHERE status = 'pending'")
    far = datetime(9000, 1, 1, tzinfo=UTC)
    for row_id, due in rows:
        deliver.apply_async((str(row_id),), eta=min(due, far))


if __name__ == "__main__":
    sys.exit(publish())
