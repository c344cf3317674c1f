"""Compares the API with a bare async FastAPI endpoint: requests per second, CPU time and p99.

``PYTHONPATH=tests uv run --group benchmarks python tests/benchmarks/bench_api.py`` starts PostgreSQL, Valkey and both
servers as processes. The bare endpoint does one INSERT through psycopg's pool, and also runs on uvicorn. The API and
the bare endpoint are measured alternately. Afterwards, follow-ups are created at half of the maximum rate measured.
`schedule_many` creates a thousand follow-ups per call. The program asserts nothing. Only ratios to the bare endpoint's
figures, from the same run, are meaningful.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import psutil
from arena import Arena
from contestants import Ours
from fastapi import FastAPI
from measures import lag, percentile
from psycopg_pool import AsyncConnectionPool
from pydantic import AwareDatetime, BaseModel
from sqlalchemy.orm import Session

import followups
from followups.api.app import POOL_SIZE
from followups.api.listening import listen
from followups.api.server import serve
from followups.database import make_engine
from followups.embedded import Processes, answers, free_port
from followups.settings import load_settings
from web import CHAT_MESSAGES, CHATS, FOLLOW_UPS, Api, start
from world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from measures import Figures
    from sqlalchemy import Engine

CONNECTIONS = 16
ROUNDS = int(os.environ.get("ROUNDS", "20"))
SECONDS = 1.0
"""The duration of one round of measurement, in seconds."""

PACED_SECONDS = 10.0
AHEAD = 15.0
"""The requests, beat and the workers start about this many seconds before the first follow-up is due."""

MANY = 1000

BARE = "/bare"


class Bare(BaseModel):
    """The request body of the bare endpoint; it has the same fields as in the API."""

    workspace_id: UUID
    chat_id: UUID
    due_date: AwareDatetime
    message: str


class BareRow(Bare):
    """The response body of the bare endpoint."""

    id: UUID
    created_at: datetime


BARE_INSERT = """
    INSERT INTO follow_ups (workspace_id, chat_id, due_date, message, trigger_chat_message_id)
    VALUES (%(workspace_id)s, %(chat_id)s, %(due_date)s, %(message)s, %(chat_id)s)
    RETURNING id, created_at
"""


def bare_app() -> FastAPI:
    """Return a bare FastAPI application whose only endpoint runs one INSERT."""
    pool = AsyncConnectionPool(os.environ["DATABASE_URL"], min_size=POOL_SIZE, max_size=POOL_SIZE, open=False)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.open(wait=True)
        yield
        await pool.close()

    app = FastAPI(lifespan=lifespan)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "up"}

    @app.post(BARE, status_code=201)
    async def create(body: Bare) -> BareRow:
        async with pool.connection() as connection, connection.cursor() as cursor:
            await cursor.execute(BARE_INSERT, body.model_dump())
            row = await cursor.fetchone()
        assert row is not None
        return BareRow(id=row[0], created_at=row[1], **body.model_dump())

    return app


@dataclass
class ApiLoad:
    """A type of request to send repeatedly, with its measured results."""

    name: str
    url: str
    make: Callable[[], bytes]
    """A function that returns the next HTTP request as bytes."""
    expected: bytes
    server: psutil.Process
    times: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """The server's processor time for one request, in seconds."""


@dataclass
class Connection:
    """A client's connection to the server."""

    load: ApiLoad
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, load: ApiLoad) -> Connection:
        place = urlsplit(load.url)
        return cls(load, *await asyncio.open_connection(place.hostname, place.port))

    async def send(self) -> None:
        """Send one request and read its response."""
        self.writer.write(self.load.make())
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await self.reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 " + self.load.expected):
            raise RuntimeError((head + body).decode())


async def send_for(load: ApiLoad, end: float) -> int:
    """Send requests one by one on a separate connection until ``end``; return their number."""
    connection = await Connection.open(load)
    sent = 0
    while (begun := time.perf_counter()) < end:
        await connection.send()
        load.times.append(time.perf_counter() - begun)
        sent += 1
    connection.writer.close()
    return sent


async def turn(load: ApiLoad) -> None:
    """Measure one turn: send requests to the server over several connections."""
    begun, before = time.perf_counter(), load.server.cpu_times()
    counts = await asyncio.gather(*(send_for(load, begun + SECONDS) for _ in range(CONNECTIONS)))
    load.rates.append(sum(counts) / (time.perf_counter() - begun))
    after = load.server.cpu_times()
    load.processor.append((after.user + after.system - before.user - before.system) / sum(counts))


async def paced(load: ApiLoad, rate: float, seconds: float) -> list[float]:
    """Send requests at the given rate; return the time from each scheduled start to the response."""
    times: list[float] = []
    started = time.perf_counter()

    async def client(number: int) -> None:
        connection = await Connection.open(load)
        due = started + number / rate
        while due < started + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await connection.send()
            times.append(time.perf_counter() - due)
            due += CONNECTIONS / rate
        connection.writer.close()

    await asyncio.gather(*map(client, range(CONNECTIONS)))
    return sorted(times)


def many(engine: Engine, workspace_id: UUID, chat_ids: list[str]) -> float:
    """Return how many follow-ups per second `schedule_many` creates, with 1,000 in each call."""
    due = datetime.now(UTC) + timedelta(days=2)
    planned = [followups.Planned(UUID(chat_ids[number % len(chat_ids)]), "Hello", due) for number in range(MANY)]
    rates = []
    for _ in range(10):
        begun = time.perf_counter()
        with Session(engine) as session, session.begin():
            followups.schedule_many(session, workspace_id=workspace_id, planned=planned)
        rates.append(MANY / (time.perf_counter() - begun))
    return statistics.median(rates)


def request(method: str, path: str, key: str, body: Any = None) -> bytes:
    """Return an HTTP request as bytes."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def chats_of(api: Api) -> list[str]:
    """Return chats whose last message is from an agent."""
    chats = [str(uuid4()) for _ in range(200)]
    for chat_id in chats:
        api.post(CHAT_MESSAGES, {"id": str(uuid4()), "chatId": chat_id, "role": "agent"})
    return chats


def loads_of(
    api: Api, chats: list[str], server: psutil.Process, bare_url: str, bare_server: psutil.Process
) -> list[ApiLoad]:
    """Return the types of requests to measure."""
    created = [api.create(chat_id)["id"] for chat_id in chats]
    due = (datetime.now(UTC) + timedelta(days=2)).isoformat()
    number = iter(range(10**9))

    def pick(values: list[str]) -> str:
        return values[next(number) % len(values)]

    def bare() -> bytes:
        body = {
            "workspace_id": str(api.world.workspace_id),
            "chat_id": pick(chats),
            "due_date": due,
            "message": "Hello",
        }
        return request("POST", BARE, "", body)

    def create() -> bytes:
        return request("POST", FOLLOW_UPS, api.key, {"chatId": pick(chats), "dueDate": due, "message": "Hello"})

    def page() -> bytes:
        return request("GET", f"{FOLLOW_UPS}?statuses=pending", api.key)

    def get() -> bytes:
        return request("GET", f"{FOLLOW_UPS}/{pick(created)}", api.key)

    def message() -> bytes:
        return request("POST", CHAT_MESSAGES, api.key, {"id": str(uuid4()), "chatId": pick(chats), "role": "agent"})

    def put() -> bytes:
        return request("PUT", f"{CHATS}/{pick(chats)}", api.key, {"channel": "api"})

    def patch() -> bytes:
        return request("PATCH", f"{FOLLOW_UPS}/{pick(created)}", api.key, {"message": str(next(number))})

    return [
        ApiLoad("bare INSERT", bare_url, bare, b"201", bare_server),
        ApiLoad("create", api.url, create, b"201", server),
        ApiLoad("get", api.url, get, b"200", server),
        ApiLoad("list (10)", api.url, page, b"200", server),
        ApiLoad("patch", api.url, patch, b"200", server),
        ApiLoad("chat message", api.url, message, b"201", server),
        ApiLoad("put chat", api.url, put, b"200", server),
    ]


def report(loads: list[ApiLoad]) -> None:
    """Print medians; a ratio compares runs of the same round, because the machine's load varies."""
    bare = loads[0].rates
    sys.stdout.write(f"{'':12} {'requests/s':>10} {'of bare':>8} {'p50 ms':>8} {'p99 ms':>8} {'CPU ms':>8}\n")
    for load in loads:
        rate, times = statistics.median(load.rates), sorted(load.times)
        ratio = statistics.median(mine / its for mine, its in zip(load.rates, bare, strict=True))
        processor = statistics.median(load.processor) * 1000
        p50, p99 = times[len(times) // 2] * 1000, times[len(times) * 99 // 100] * 1000
        sys.stdout.write(f"{load.name:12} {rate:10.0f} {ratio:8.2f} {p50:8.1f} {p99:8.1f} {processor:8.2f}\n")


def lag_beside(arena: Arena, load: ApiLoad, rate: float) -> Figures:
    """Return the lag of follow-ups sent at 100/s while requests arrive at the given rate."""
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(asyncio.run, paced(load, rate, PACED_SECONDS + 2 * AHEAD))
        figures = lag(Ours(arena), 100, PACED_SECONDS, ahead=AHEAD)
        loading.result()
    return figures


def main() -> None:
    """Start all servers, measure them in turn, and print the figures."""
    with Arena() as arena, Processes() as processes:
        settings = load_settings(
            database_url=arena.database,
            broker_url=arena.broker,
            transport_url="http://127.0.0.1:9/",
            api_rate_limit=10**8,
        )
        web, url = start(processes, settings.environment())
        port = free_port()
        bare_url = f"http://127.0.0.1:{port}"
        bare = processes.spawn(
            "bare",
            [sys.executable, __file__, "--bare", str(port)],
            environment={"DATABASE_URL": arena.database},
            ready=answers(f"{bare_url}/healthz"),
        )
        engine = make_engine(arena.database)
        api = Api(url, World(engine))
        chats = chats_of(api)
        loads = loads_of(api, chats, psutil.Process(web.pid), bare_url, psutil.Process(bare.pid))
        for number in range(ROUNDS + 1):
            for load in loads:
                asyncio.run(turn(load))
            if number == 0:  # the first round only warms up the servers
                for load in loads:
                    load.times.clear()
                    load.rates.clear()
                    load.processor.clear()
        report(loads)
        create = loads[1]
        half = statistics.median(create.rates) / 2
        for load in loads[:2] * 2:  # measure the bare endpoint too: it shows the limit of this machine
            times = asyncio.run(paced(load, half, PACED_SECONDS))
            p50, p99 = (percentile(times, part) * 1000 for part in (0.5, 0.99))
            sys.stdout.write(f"{load.name} at {half:.0f}/s, half of our maximum: p50 {p50:.1f}, p99 {p99:.1f} ms\n")
        sys.stdout.write(f"schedule_many of {MANY:,}: {many(engine, api.world.workspace_id, chats):.0f} follow-ups/s\n")
        late = lag_beside(arena, create, half)
        sys.stdout.write(f"delivery at 100/s beside that: p99 {late['p99_ms']:.1f} ms late\n")
        api.client.close()
        engine.dispose()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        serve(bare_app(), [listen("127.0.0.1", int(sys.argv[2]))])
    else:
        main()
