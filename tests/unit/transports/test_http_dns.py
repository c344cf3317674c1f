"""An unresponsive name server delays neither calls to other hosts nor the closing of the client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import asyncio, fcntl, socket, struct, threading, time
import uvloop
from followups.settings import load_settings
from followups.transports.http import DIALECT
from followups.transports.http_client import HttpClient

UP = struct.pack("16sh14s", b"lo", 0x1 | 0x8 | 0x40, b"")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, UP)  # SIOCSIFFLAGS: the loopback of this network
names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
names.bind(("127.0.0.1", 53))

def serve_names():  # answers only queries for the IPv4 address of half.example
    while True:
        query, peer = names.recvfrom(4096)
        end = 12 + query[12:].index(0) + 5
        if query[12:].startswith(b"\\4half") and query[end - 3] == 1:
            answer = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4\\x7f\\0\\0\\1"
            names.sendto(query[:2] + b"\\x81\\x80\\0\\1\\0\\1\\0\\0\\0\\0" + query[12:end] + answer, peer)

threading.Thread(target=serve_names, daemon=True).start()

async def serve(reader, writer):
    await reader.readuntil(b"{}")
    writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\n\\r\\n")

async def main():
    gaps = [time.monotonic()]

    async def turn():
        while True:
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic())

    url = "http://slow.example/"
    client = HttpClient(
        load_settings(database_url="postgresql://x/y", broker_url="redis://x", transport_url=url, transport_timeout=0.5)
    )
    turning = asyncio.create_task(turn())
    await client.open()
    calls = [asyncio.create_task(client.deliver(url, [], b"{}", DIALECT)) for _ in range(3)]
    print(*[type(outcome).__name__ for outcome in await asyncio.gather(*calls)])
    calls = [asyncio.create_task(client.deliver(url, [], b"{}", DIALECT)) for _ in range(3)]
    await asyncio.sleep(0.1)
    calls[0].cancel()
    await client.close()
    await asyncio.sleep(0.1)
    ended = await asyncio.gather(*calls, return_exceptions=True)
    print(*[type(outcome).__name__ for outcome in ended])
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://half.example:{server.sockets[0].getsockname()[1]}/"
    client = HttpClient(
        load_settings(database_url="postgresql://x/y", broker_url="redis://x", transport_url=url, transport_timeout=8)
    )
    await client.open()
    print(type(await client.deliver(url, [], b"{}", DIALECT)).__name__)
    await client.close()
    await asyncio.sleep(0.1)
    turning.cancel()
    print(max(later - sooner for sooner, later in zip(gaps, gaps[1:])) < 2)

uvloop.run(main())
"""


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid(), reason="a name server of its own takes namespaces")
def test_a_silent_name_server_costs_only_the_timeout(tmp_path: Path) -> None:
    """With an unresponsive name server, calls time out without sending anything.

    An unresponsive name server delays neither the event loop nor the closing of the client, even if it answers the
    query for IPv4 addresses, but not the one for IPv6 addresses.
    """
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:2\n")
    inside = f'mount --bind "{resolver}" /etc/resolv.conf && exec "{sys.executable}" -c "$SCRIPT"'
    ran = subprocess.run(
        ["unshare", "-mn", "sh", "-c", inside],  # noqa: S607 - found on the system's path
        env=os.environ | {"SCRIPT": SCRIPT},
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    if "Operation not permitted" in ran.stderr:
        pytest.skip("no namespaces here")
    assert ran.stdout.splitlines() == ["Retry Retry Retry", "CancelledError Retry Retry", "Sent", "True"], ran.stderr
