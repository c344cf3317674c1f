"""A TCP proxy that can cut, stall and refuse connections like a faulty network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

CHUNK = 65_536
ESTABLISHED = 1
"""The value by which Linux's TCP_INFO marks an established connection."""


class Proxy:
    """Forwards a loopback port to a server. The proxy's methods may be called from the test's thread.

    ``stall`` simulates half-open connections: the kernel keeps acknowledging data, but no answer arrives.
    """

    def __init__(self, server_url: str) -> None:
        """Store the server's URL: ``redis://...``, or a PostgreSQL URL with the socket directory in ``?host=``."""
        self._url = server_url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._forwarding = asyncio.Event()
        self._refusing = False
        self.port = 0
        self.frozen = 0
        """The number of connections that will never forward data again."""

    def __enter__(self) -> Self:
        """Start listening."""
        self._thread.start()
        self._call(self._forwarding.set)
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections and the listening socket."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        """The server's URL with the proxy's host and port."""
        parts = urlsplit(self._url)
        user = parts.netloc.rpartition("@")[0]
        host = f"{user}@127.0.0.1:{self.port}" if user else f"127.0.0.1:{self.port}"
        query = "sslmode=disable" if parts.scheme.startswith("postgres") else parts.query
        return urlunsplit((parts.scheme, host, parts.path, query, ""))

    def cut(self) -> None:
        """Break all open connections, but accept new ones."""
        self._call(self._abort)

    def lead_to(self, server_url: str) -> None:
        """Route new connections to another server; open connections stay connected to their current server."""
        self._url = server_url

    def freeze(self) -> None:
        """Stop forwarding on all open connections; new connections are forwarded."""
        self._call(self._freeze)

    def stall(self) -> None:
        """Forward nothing on existing or new connections, but close none of them."""
        self._call(self._forwarding.clear)

    def flow(self) -> None:
        """Forward the data that was held back, and let new data and connections through again."""
        self._refusing = False
        self._call(self._forwarding.set)

    def refuse(self) -> None:
        """Break all open connections, and break each new connection at once."""
        self._refusing = True
        self.cut()

    def given_up(self) -> int:
        """Return how many clients closed their connections while forwarding was stopped."""
        return sum(_is_closed(writer) for writer in tuple(self._open))

    def _call(self, function: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait()

    def _freeze(self) -> None:
        self.frozen += len(self._open) // 2
        self._forwarding.clear()  # open connections wait for this event, which is never set again
        self._forwarding = asyncio.Event()
        self._forwarding.set()

    def _abort(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self._open.add(writer)
        # If this handler ended with CancelledError, asyncio's own callback would raise an error.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            forwarding = self._forwarding
            await forwarding.wait()
            upward, downward = await self._connect()
            self._open.add(downward)
            try:
                await asyncio.gather(self._pump(reader, downward, forwarding), self._pump(upward, writer, forwarding))
            finally:
                self._open.discard(downward)
                downward.transport.abort()
        self._open.discard(writer)
        writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self._url)
        if host := parse_qs(parts.query).get("host"):
            return await asyncio.open_unix_connection(f"{host[0]}/.s.PGSQL.{parts.port or 5432}")
        return await asyncio.open_connection(parts.hostname, parts.port)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, forwarding: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await forwarding.wait()
                writer.write(data)
                await writer.drain()
        # When one end of a proxied connection closes, the proxy closes the other end too.
        writer.transport.abort()

    async def _close(self) -> None:
        if self._server:
            self._server.close()
        self._forwarding.set()
        self._abort()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _is_closed(client: asyncio.StreamWriter) -> bool:
    end = client.get_extra_info("socket")
    if end.family != socket.AF_INET or end.fileno() == -1:
        return end.fileno() == -1
    return end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != ESTABLISHED
