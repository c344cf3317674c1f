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
import asyncio, fcntl, socket, struct, time
import uvloop
from followups.settings import load_settings
from followups.transports.http import DIALECT
from followups.transports.http_client import HttpClient

UP = struct.pack("16sh14s", b"lo", 0x1 | 0x8 | 0x40, b"")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, UP)  # SIOCSIFFLAGS: the loopback of this network
silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
silent.bind(("127.0.0.1", 53))

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
    turning.cancel()
    print(max(later - sooner for sooner, later in zip(gaps, gaps[1:])) < 10)

uvloop.run(main())
"""


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid(), reason="a name server of its own takes namespaces")
def test_a_silent_name_server_costs_only_the_timeout(tmp_path: Path) -> None:
    """With an unresponsive name server, calls time out without sending anything.

    An unresponsive name server delays neither the event loop nor the closing of the client.
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
    assert ran.stdout.splitlines() == ["Retry Retry Retry", "CancelledError Retry Retry", "True"], ran.stderr
