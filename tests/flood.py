"""A flood of requests: ``python tests/flood.py HOST PORT CONNECTIONS SECONDS PATH...``, with the API key in $FLOOD_KEY.

The flood is a separate process, so that it does not slow down the test. Each connection sends one request after
another; a closed connection is opened again.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import suppress

HEAD = f"host: a\r\nauthorization: {os.environ['FLOOD_KEY']}\r\n" if "FLOOD_KEY" in os.environ else "host: a\r\n"


async def ask(host: str, port: int, path: str, until: float) -> None:
    """Request the path repeatedly on one connection, until the connection ends or the time is up."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        while time.monotonic() < until:
            writer.write(f"GET {path} HTTP/1.1\r\n{HEAD}\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
    finally:
        writer.close()


async def request_until(host: str, port: int, path: str, until: float) -> None:
    """Request the path until the time is up; whenever the connection ends, open a new one."""
    while time.monotonic() < until:
        with suppress(OSError, asyncio.IncompleteReadError):
            await ask(host, port, path, until)


async def main(host: str, port: int, connections: int, seconds: float, paths: list[str]) -> None:
    """Open all connections, and distribute them evenly over the paths."""
    until = time.monotonic() + seconds
    clients = [asyncio.create_task(request_until(host, port, paths[n % len(paths)], until)) for n in range(connections)]
    await asyncio.wait(clients, timeout=seconds + 1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]))
