"""Tests in which one client floods the API; figures show how much other clients are delayed."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from followups.api import server
from followups.embedded import Processes
from web import FOLLOW_UPS, ROOT, Api, start
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Engine

    from followups.settings import Settings

MIB = 1024 * 1024
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"
POST = b"POST /api/v1/chat-messages HTTP/1.1\r\nhost: a\r\n"


@dataclass
class Flood:
    """A flood's cost: CPU time, memory of the web process, and waits of other clients."""

    cpu: float = 0.0
    memory: float = 0.0
    """The largest increase of the web process's memory, in MiB."""
    waits: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    """For each measured wait, how many seconds the web process's event loop was busy.

    During the rest of each wait, the machine ran other processes.
    """

    def held_up_less(self, limit: float) -> bool:
        """Return whether 95 % of the other requests were delayed by less than the limit.

        The limit applies to the time during which the web process is ``busy``, not to the whole wait. Measured by the
        wall clock, half of the requests may take up to ten times the limit on a busy machine.
        """
        return p95(self.busy) < limit and statistics.median(self.waits) < 10 * limit

    def __str__(self) -> str:
        waits = f"others' p95 {p95(self.busy) * 1000:.0f} ms of the loop, {p95(self.waits) * 1000:.0f} ms by the clock"
        return f"CPU {self.cpu:.2f} s, memory {self.memory:+.0f} MiB, {waits}"


def p95(waits: list[float]) -> float:
    """Return the 95th percentile of the values."""
    return sorted(waits)[len(waits) * 95 // 100]


def address_of(url: str) -> tuple[str, int]:
    """Return the host and port of a URL."""
    parts = urlsplit(url)
    assert parts.hostname
    return parts.hostname, parts.port or 80


@dataclass
class Web:
    """A web process that is used only by the tests in this module."""

    pid: int
    api: Api
    other: Api
    """The client whose waiting times are measured; no other client uses its workspace."""

    @property
    def address(self) -> tuple[str, int]:
        """The web process's host and port."""
        return address_of(self.api.url)

    @property
    def key(self) -> bytes:
        """A request header with an API key."""
        return f"authorization: {self.api.key}\r\n".encode()

    def connect(self) -> socket.socket:
        """Return a new connection to the web process."""
        return socket.create_connection(self.address, timeout=20)

    def cpu(self) -> float:
        """Return the seconds of CPU time that the web process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return the resident memory of the web process in MiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    @contextmanager
    def flooded(self, what: str) -> Iterator[Flood]:
        """Yield the cost of a code block; the cost is complete when the block ends."""
        flood, over = Flood(), threading.Event()
        cpu, memory, peak = self.cpu(), self.memory(), [0.0]

        def observe() -> None:
            while not over.wait(0.01):
                self.wait(flood)
                peak[0] = max(peak[0], self.memory())

        observer = threading.Thread(target=observe)
        observer.start()
        try:
            yield flood
        finally:
            over.set()
            observer.join()
        self.wait(flood)
        flood.cpu, flood.memory = self.cpu() - cpu, max(*peak, self.memory()) - memory
        print(f"{what}: {flood}")  # noqa: T201 - prints the measurement

    def wait(self, flood: Flood) -> None:
        """Send another client's request on a new connection, and record how long its response takes."""
        started, busy = time.perf_counter(), self.loop_time()
        with self.connect() as connection:
            key = self.other.key
            connection.sendall(f"GET {FOLLOW_UPS} HTTP/1.1\r\nhost: a\r\nauthorization: {key}\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        flood.waits.append(time.perf_counter() - started)
        flood.busy.append(self.loop_time() - busy)

    def loop_time(self) -> float:
        """Return the seconds of CPU time that the event loop's thread has used."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9


@pytest.fixture(scope="module")
def web(web_settings: Settings, web_engine: Engine) -> Iterator[Web]:
    """Start a web process and return its handle."""
    with Processes() as processes:
        child, url = start(processes, web_settings.environment())
        api, other = Api(url, World(web_engine)), Api(url, World(web_engine))
        with api.client, other.client:
            web = Web(child.pid, api, other)
            api.get(FOLLOW_UPS)  # the first request loads modules, which would otherwise count as memory growth
            yield web


def answered(connection: socket.socket) -> bytes:
    """Return the start of the response, or empty bytes if the connection was closed first."""
    with suppress(OSError):
        return connection.recv(4096)[:12]
    return b""


@pytest.mark.parametrize("has_key", [False, True])
def test_a_million_chunks(web: Web, *, has_key: bool) -> None:
    """A body sent in a million one-byte chunks is rejected long before the last chunk."""
    with web.flooded(f"a million chunks, {'with' if has_key else 'without'} a key") as flood, web.connect() as client:
        client.sendall(POST + (web.key if has_key else b"") + b"transfer-encoding: chunked\r\n\r\n")
        with suppress(ConnectionError):
            for _ in range(100):
                client.sendall(b"1\r\nx\r\n" * 10_000)
        answer = answered(client)
    assert answer in {b"", b"HTTP/1.1 413" if has_key else b"HTTP/1.1 401"}
    assert flood.cpu < 1.5
    assert flood.held_up_less(0.2)


@pytest.mark.parametrize("has_key", [False, True])
def test_many_unknown_fields(web: Web, *, has_key: bool) -> None:
    """A request body with more than 50,000 unknown fields does not delay other clients.

    Without a valid API key, a request body is not read.
    """
    body = json.dumps({f"unknown{number}": 1 for number in range(60_000)}).encode()[: MIB - 1] + b"}"
    head = f"PATCH {FOLLOW_UPS}/{uuid4()} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n".encode()
    with web.flooded(f"many unknown fields, {'with' if has_key else 'without'} a key") as flood:
        for _ in range(5):
            with web.connect() as client, suppress(ConnectionError):
                client.sendall(head + (web.key if has_key else b"") + b"\r\n" + body)
                received = client.recv(MIB)
                assert len(received) < 20_000
    assert flood.held_up_less(0.15 if not has_key else 0.5)


def test_bodies_that_do_not_end(web: Web) -> None:
    """The memory limit holds even for 300 unfinished bodies of nearly 1 MiB each."""
    with ExitStack() as clients, web.flooded("300 bodies that do not end") as flood:
        for _ in range(300):
            client = clients.enter_context(web.connect())
            with suppress(OSError):
                client.sendall(POST + web.key + b"content-length: 1048576\r\n\r\n" + b" " * (MIB - 1))
    assert flood.memory < 64
    assert flood.held_up_less(0.5)


def test_clients_that_do_not_read(web: Web) -> None:
    """If 15 clients do not read their 26 MB responses, memory stays bounded and other clients are served."""
    chat = web.api.world.chat()
    web.api.world.sql(
        "INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id)"
        " SELECT :workspace_id, :chat_id, repeat(:text, 65536), now() + n * interval '1 day', gen_random_uuid()"
        " FROM generate_series(1, 100) AS n",
        workspace_id=web.api.world.workspace_id,
        chat_id=chat,
        text="\N{GRINNING FACE}",
    )
    with ExitStack() as clients, web.flooded("15 clients that do not read 26 MB") as flood:
        for _ in range(15):
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(web.address)
            client.sendall(f"GET {FOLLOW_UPS}?pageSize=100 HTTP/1.1\r\nhost: a\r\n".encode() + web.key + b"\r\n")
        time.sleep(3)
    assert flood.memory < 160
    assert flood.held_up_less(0.5)
    page = web.api.get(FOLLOW_UPS, pageSize=100)
    assert len(page.content) > 26_000_000
    assert {len(each["message"]) for each in page.json()} == {65_536}


STRANGERS = (
    "/healthz",
    "/readyz",
    "/metrics",
    "/docs",
    "/docs/swagger-ui-bundle.js",
    "/openapi.json",
    "/nothing",
    f"{FOLLOW_UPS}/{uuid4()}",
)
"""Paths that clients without an API key request."""


def beside_400_connections(web: Web, paths: Sequence[str], key: str | None) -> float:
    """Request the paths on 400 connections; return another workspace's median response time."""
    host, port = web.address
    flood = [sys.executable, str(ROOT / "tests/flood.py"), host, str(port), "400", "2", *paths]
    times = []
    with subprocess.Popen(flood, env={**os.environ, **({"FLOOD_KEY": key} if key else {})}) as flooding:
        time.sleep(0.7)
        while flooding.poll() is None and len(times) < 50:
            begun = time.perf_counter()
            assert web.other.get(FOLLOW_UPS, pageSize=1).status_code == 200
            times.append(time.perf_counter() - begun)
            time.sleep(0.01)
    figures = f"p50 {statistics.median(times) * 1000:.0f} ms, p95 {p95(times) * 1000:.0f} ms"
    print(f"another's list beside 400 connections to {', '.join(paths)}: {figures}")  # noqa: T201 - the figure
    return statistics.median(times)


@pytest.mark.parametrize("paths", [pytest.param([each], marks=pytest.mark.large) for each in STRANGERS] + [STRANGERS])
def test_clients_without_a_key_on_400_connections(web: Web, paths: Sequence[str]) -> None:
    """While clients without a key send requests on 400 connections, another workspace is still served."""
    assert beside_400_connections(web, paths, None) < 0.25


def test_one_workspace_on_400_connections(web: Web) -> None:
    """While one client sends valid and invalid requests on 400 connections, other workspaces are served."""
    paths = (f"{FOLLOW_UPS}?statuses=failed", f"{FOLLOW_UPS}?pageSize=0", f"{FOLLOW_UPS}/{uuid4()}")
    assert beside_400_connections(web, paths, web.api.key) < 0.5


@pytest.mark.large
@pytest.mark.usefixtures("many_files")
def test_slowloris(web: Web) -> None:
    """During a slowloris attack on all connections, other clients are served without delay."""
    host, port = web.address
    sockets = server.MAX_CONNECTIONS + 100
    tool = ["slowloris", host, "--port", str(port), "--sockets", str(sockets), "--sleeptime", "1"]
    command = [str(Path(sys.executable).with_name(tool[0])), *tool[1:]]
    log = subprocess.PIPE
    with web.flooded(" ".join(tool)) as flood, subprocess.Popen(command, stderr=log, text=True) as attack:
        # When the server closes unfinished connections, the slowloris client opens new ones.
        time.sleep(server.HEADER_WITHIN + 3)
        attack.terminate()
        said = attack.communicate(timeout=20)[1]
    assert re.search(r"Creating \d+ new sockets", said)
    assert flood.memory < 160
    assert flood.held_up_less(0.2)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Allow this process more open files than the web server allows connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.large
@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("sent", [HEALTH, b"", b"GET /healthz HTTP/1.1\r\nx: ", HEALTH + b"GET /"])
def test_more_connections_than_allowed(web: Web, sent: bytes) -> None:
    """2,100 idle, silent or slow connections do not keep other clients from connecting."""
    with ExitStack() as clients, web.flooded(f"{server.MAX_CONNECTIONS + 100} connections: {sent!r}") as flood:
        for _ in range(server.MAX_CONNECTIONS // 100 + 1):
            for _ in range(100):
                client = clients.enter_context(web.connect())
                client.sendall(sent)
            # the server accepts these connections before more arrive, so the kernel's queue never overflows
            web.wait(flood)
        for _ in range(50):
            assert web.api.get(FOLLOW_UPS, pageSize=1).status_code == 200
    assert flood.memory < 160
    assert flood.held_up_less(0.2)
