"""An upper limit for throughput: a bare asyncio loop that works in batches, without a broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import UUID

import aiohttp
import psycopg

from rivals.place import DATABASE, RECEIVER

Post = Callable[[UUID, str], Awaitable[UUID]]

IN_FLIGHT = 200
CLAIM = """
    UPDATE bench_rows SET status = 'queued'
     WHERE id IN (SELECT id FROM bench_rows WHERE status = 'pending' AND due_date <= now()
                   ORDER BY due_date LIMIT 500 FOR UPDATE SKIP LOCKED)
    RETURNING id, message
"""
SETTLE = """
    UPDATE bench_rows SET status = 'sent', message_id = b.message_id
      FROM unnest(%s::uuid[], %s::uuid[]) AS b(id, message_id) WHERE bench_rows.id = b.id
"""


async def claim(waiting: asyncio.Queue[tuple[UUID, str]]) -> None:
    """Claim rows in a loop and add them to the queue."""
    async with await psycopg.AsyncConnection.connect(DATABASE, autocommit=True) as connection:
        while True:
            if waiting.qsize() > 1000:
                await asyncio.sleep(0.002)
                continue
            rows = await (await connection.execute(CLAIM)).fetchall()
            for row in rows:
                waiting.put_nowait(row)
            await asyncio.sleep(0 if rows else 0.01)


async def send(post: Post, waiting: asyncio.Queue[tuple[UUID, str]], sent: list[tuple[UUID, UUID]]) -> None:
    """Send queued messages one after the other."""
    while True:
        row_id, message = await waiting.get()
        sent.append((row_id, await post(row_id, message)))


async def settle(sent: list[tuple[UUID, UUID]]) -> None:
    """Record sent follow-ups every few milliseconds."""
    async with await psycopg.AsyncConnection.connect(DATABASE, autocommit=True) as connection:
        while True:
            await asyncio.sleep(0.005)
            if batch := sent[:500]:
                del sent[: len(batch)]
                await connection.execute(SETTLE, ([one for one, _ in batch], [other for _, other in batch]))


async def run(post: Post) -> None:
    """Run until the process is stopped."""
    waiting: asyncio.Queue[tuple[UUID, str]] = asyncio.Queue()
    sent: list[tuple[UUID, UUID]] = []
    await asyncio.gather(claim(waiting), settle(sent), *(send(post, waiting, sent) for _ in range(IN_FLIGHT)))


async def main() -> None:
    """Run the benchmark's loop with an aiohttp session."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post(row_id: UUID, message: str) -> UUID:
            async with session.post(RECEIVER, json={"followUpId": str(row_id), "message": message}) as answer:
                return UUID((await answer.json())["chatMessageId"])

        await run(post)


if __name__ == "__main__":
    asyncio.run(main())
