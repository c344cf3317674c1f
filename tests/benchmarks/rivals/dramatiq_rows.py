"""Dramatiq: a loop finds due rows and enqueues one Dramatiq message per row."""

from __future__ import annotations

import time
from uuid import UUID

import dramatiq
import psycopg
import requests
from dramatiq.brokers.redis import RedisBroker
from psycopg_pool import ConnectionPool

from rivals.place import BROKER, DATABASE, RECEIVER

dramatiq.set_broker(RedisBroker(url=BROKER))
pool = ConnectionPool(DATABASE, min_size=0, max_size=10, open=False)
http = requests.Session()

FIND = """
    UPDATE bench_rows SET status = 'queued'
     WHERE id IN (SELECT id FROM bench_rows WHERE status = 'pending' AND due_date <= now()
                   ORDER BY due_date LIMIT 1000 FOR UPDATE SKIP LOCKED)
    RETURNING id, message
"""


@dramatiq.actor(max_retries=5)
def deliver(row_id: str, message: str) -> None:
    """Send one message and record it in its row."""
    answer = http.post(RECEIVER, json={"followUpId": row_id, "message": message}, timeout=30)
    answer.raise_for_status()
    pool.open()  # opened in the worker's process, after the fork; opening twice has no effect
    with pool.connection() as connection:
        connection.execute(
            "UPDATE bench_rows SET status = 'sent', message_id = %s WHERE id = %s",
            (UUID(answer.json()["chatMessageId"]), UUID(row_id)),
        )


def poll() -> None:
    """Ten times per second, enqueue all due rows."""
    with psycopg.connect(DATABASE, autocommit=True) as connection:
        while True:
            rows = connection.execute(FIND).fetchall()
            for row_id, message in rows:
                deliver.send(str(row_id), message)
            time.sleep(0 if rows else 0.1)


if __name__ == "__main__":
    poll()
