"""An HTTP/2 server over TLS whose streams a test controls."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes

from unit.transports.doubles import listening

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping


@dataclass
class Stream:
    """A complete request on an HTTP/2 stream, with methods to answer it."""

    connection: Http2Connection
    id: int
    headers: Mapping[str, str]
    body: bytes = b""

    def answer(self, status: int, body: bytes = b"", *, ends: bool = True, **headers: str) -> None:
        """Send a response that fits the flow control window; ``retry_after="1"`` becomes ``retry-after: 1``."""
        names = [(":status", str(status)), *((name.replace("_", "-"), value) for name, value in headers.items())]
        self.connection.h2.send_headers(self.id, names, end_stream=ends and not body)
        if body:
            self.connection.h2.send_data(self.id, body, end_stream=ends)
        self.connection.flush()

    def reset(self, code: int) -> None:
        """Reset the stream with RST_STREAM."""
        self.connection.h2.reset_stream(self.id, code)
        self.connection.flush()


@dataclass
class Http2Connection:
    """An HTTP/2 connection with its streams by number."""

    writer: asyncio.StreamWriter
    h2: H2Connection
    requested: dict[int, Stream] = field(default_factory=dict)
    resets: list[int] = field(default_factory=list)

    def flush(self) -> None:
        """Send the data that h2 has queued."""
        self.writer.write(self.h2.data_to_send())


@dataclass
class Http2Server:
    """A server that passes each complete request to ``serve``."""

    serve: Callable[[Stream], Awaitable[None]]
    streams_at_once: int = 100
    connections: list[Http2Connection] = field(default_factory=list)
    requests: list[Stream] = field(default_factory=list)
    requested: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        h2.local_settings = h2.local_settings.__class__(
            client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: self.streams_at_once}
        )
        connection = Http2Connection(writer, h2)
        self.connections.append(connection)
        h2.initiate_connection()
        connection.flush()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                for event in h2.receive_data(data):
                    self._take(connection, event)
                connection.flush()

    def _take(self, connection: Http2Connection, event: object) -> None:
        match event:
            case RequestReceived():
                connection.requested[event.stream_id] = Stream(connection, event.stream_id, dict(event.headers))
            case DataReceived():
                connection.requested[event.stream_id].body += event.data
                connection.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case StreamEnded():
                self.requests.append(connection.requested[event.stream_id])
                self.requested.set()
                task = asyncio.ensure_future(self.serve(connection.requested[event.stream_id]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case StreamReset():
                connection.resets.append(event.stream_id)
            case _:
                pass


@asynccontextmanager
async def serving_http2(
    serve: Callable[[Stream], Awaitable[None]], context: ssl.SSLContext, streams_at_once: int = 100
) -> AsyncIterator[Http2Server]:
    """Run a server that supports only HTTP/2."""
    context.set_alpn_protocols(["h2"])
    server = Http2Server(serve, streams_at_once)
    async with listening(server.run, context) as server.url:
        yield server
