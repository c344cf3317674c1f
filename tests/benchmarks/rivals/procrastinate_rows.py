"""Procrastinate: for each row, PostgreSQL stores an asynchronous job that is due at the row's time."""

from __future__ import annotations

import asyncio
from uuid import UUID

import aiohttp
import psycopg
from procrastinate import App, PsycopgConnector

from rivals.place import DATABASE, RECEIVER

app = App(connector=PsycopgConnector(conninfo=DATABASE, min_size=4, max_size=20))
sessions: list[aiohttp.ClientSession] = []


@app.task(name="deliver")
async def deliver(row_id: str, message: str) -> None:
    """Send one message and record it in its row."""
    if not sessions:
        sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=100)))
    async with sessions[0].post(RECEIVER, json={"followUpId": row_id, "message": message}) as answer:
        answer.raise_for_status()
        document = await answer.json()
    await app.connector.execute_query_async(
        "UPDATE bench_rows SET status = 'sent', message_id = %(message_id)s WHERE id = %(id)s",
        message_id=UUID(document["chatMessageId"]),
        id=UUID(row_id),
    )


async def publish() -> None:
    """Defer a job for every pending row."""
    with psycopg.connect(DATABASE) as connection:
        rows = connection.execute("SELECT id, due_date, message FROM bench_rows WHERE status = 'pending'").fetchall()
        connection.execute("UPDATE bench_rows SET status = 'queued' WHERE status = 'pending'")
    async with app.open_async():
        for row_id, due, message in rows:
            await deliver.configure(schedule_at=due).defer_async(row_id=str(row_id), message=message)


async def work() -> None:
    """Run Procrastinate's worker, which executes the jobs."""
    async with app.open_async():
        await app.run_worker_async(
            concurrency=100, fetch_job_polling_interval=0.1, delete_jobs="successful", install_signal_handlers=True
        )


async def schema() -> None:
    """Create Procrastinate's tables."""
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


if __name__ == "__main__":
    import sys

    asyncio.run({"publish": publish, "work": work, "schema": schema}[sys.argv[1]]())
