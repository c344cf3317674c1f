"""The benchmarks' receiver, which answers requests at minimal cost and records their arrival.

    python -m followups.embedded.receiver --port 9100

``GET /control?delay=0.05&slow=0.01&slow_delay=5`` resets the receiver. After a reset, each response is delayed by
``delay`` seconds. A fraction ``slow`` of the responses is delayed by ``slow_delay`` seconds instead. ``GET /count``
returns the number of requests. ``GET /times`` returns when each follow-up first arrived, in seconds since 1970.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from urllib.parse import parse_qsl, urlsplit

KEY = b'"followUpId"'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


class RequestLog:
    """The received requests and the configured delays, shared by all connections."""

    def __init__(self) -> None:
        """Create an empty log, without a delay for responses."""
        self.reset()

    def reset(self, delay: str = "0", slow: str = "0", slow_delay: str = "5") -> None:
        """Delete all recorded requests."""
        self.times: dict[str, float] = {}
        self.requests = 0
        self.delay = float(delay)
        self.every = round(1 / float(slow)) if float(slow) else 0
        self.slow_delay = float(slow_delay)

    def take(self, follow_up_id: str) -> float:
        """Record a request and return the number of seconds to wait before the response."""
        self.requests += 1
        self.times.setdefault(follow_up_id, time.time())
        return self.slow_delay if self.every and self.requests % self.every == 0 else self.delay


class ReceiverConnection(asyncio.Protocol):
    """One keep-alive connection, on which a request may arrive in several pieces."""

    def __init__(self, record: RequestLog) -> None:
        """Store the log in which requests are recorded."""
        self._record = record
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the asyncio transport of the new connection."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each request that has arrived completely."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            place = head.find(b"content-length:")
            length = int(head[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            if head.startswith(b"get"):
                self._write(self._control(head.split(b" ", 2)[1].decode()))
            else:
                self._deliver(body)

    def _deliver(self, body: bytes) -> None:
        start = body.index(b'"', body.index(b":", body.index(KEY))) + 1
        name = body[start : start + 36]
        delay = self._record.take(name.decode())
        answer = b'{"chatMessageId":"%s"}' % name
        if delay:
            asyncio.get_running_loop().call_later(delay, self._write, answer)
        else:
            self._write(answer)

    def _control(self, target: str) -> bytes:
        place = urlsplit(target)
        if place.path == "/control":
            self._record.reset(**dict(parse_qsl(place.query)))
        if place.path == "/times":
            return json.dumps(self._record.times).encode()
        return json.dumps({"requests": self._record.requests, "different": len(self._record.times)}).encode()

    def _write(self, body: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(HEAD % (len(body), body))  # type: ignore[attr-defined]


async def main() -> None:
    """Serve requests until the process is terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    record = RequestLog()
    gc.disable()  # there are no reference cycles here, and garbage collection would count as lag
    server = await asyncio.get_running_loop().create_server(
        lambda: ReceiverConnection(record), "127.0.0.1", parser.parse_args().port, backlog=1000
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
