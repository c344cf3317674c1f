"""One HTTP request and its answer, through the callbacks of libcurl.

This module records whether any part of a request may have been sent. Once connected, libcurl asks for the body and then
sends the first byte. Until libcurl asks for the body, nothing has been sent.

If a kept connection ends without an answer, or if the server refuses an HTTP/2 stream, libcurl would repeat the request
on another connection. This module gives libcurl no way to rewind the body, so libcurl gives up
(CURLE_SEND_FAIL_REWIND). If the server demands HTTP/1.1 for a request (HTTP_1_1_REQUIRED), libcurl opens another
connection, and this module does not let it send. For libcurl, a refused stream (REFUSED_STREAM, GOAWAY) looks like a
lost one, so the request's outcome is unknown.
"""

from __future__ import annotations

import math
import re
import zlib
from http import HTTPStatus
from typing import TYPE_CHECKING

import pycurl

from followups.transports.answers import Answer
from followups.transports.curl_loop import CLOSED
from followups.transports.descriptors import Descriptor
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from followups.transports.http_sockets import Address, Sockets

BODY_LIMIT = 64 * 1024
"""Maximum number of bytes that are read from an answer body (deploy/ENDPOINT.md)."""

HEAD_LIMIT = 64 * 1024
"""Maximum size of an answer's head in bytes, including the informational (1xx) answers before it."""

LONG = "the body of the answer is longer than 64 KiB"
LONG_HEAD = "the header of the answer is longer than 64 KiB"
LATE = "the body of the answer did not arrive in time"
NOT_DECOMPRESSED = "the body of the answer cannot be decompressed"

TOO_LARGE = 100
"""libcurl's error code for an answer with too long a line (CURLE_TOO_LARGE)."""

FLOODED = -2
"""The result code of calls during which too much arrived; not one of libcurl's codes."""

_BAD_HEADER = {pycurl.E_BAD_CONTENT_ENCODING, pycurl.E_FTP_WEIRD_SERVER_REPLY}
"""libcurl's error codes for an invalid header. pycurl knows CURLE_WEIRD_SERVER_REPLY only by its old name."""
_TOO_LONG = {pycurl.E_WRITE_ERROR, TOO_LARGE}
"""libcurl's error codes for a header or a body that is too long: our callbacks end the transfer, or a line is too long.
"""

_STATUS_LINE = re.compile(rb"HTTP/[\d.]+ ([1-5]\d\d)\s(?!.*HTTP/)", re.IGNORECASE)
"""A status line with a status from 100 to 599. libcurl accepts higher ones, and text right after the third digit.

A line with a second status line is composed of parts of two answers.
"""
_ACCEPTED = re.compile(rb"HTTP/[\d.]+ 2")
"""The status line with which a proxy accepts a CONNECT request."""

_CLOSING = b"shutting down connection"
"""What libcurl reports before it closes a TLS connection in an orderly way."""

_STOP = -1
"""Value that a callback returns to end the transfer and its connection."""
_CONTINUE: int = pycurl.PREREQFUNC_OK
_ABORT: int = pycurl.PREREQFUNC_ABORT
_READ_HEADERS = {b"retry-after", b"date", b"content-encoding"}

_COMPRESSED = {b"\x1f\x8b", b"x\x01", b"x^", b"x\x9c", b"x\xda"}
"""The first bytes of the formats gzip and deflate (with each of zlib's compression levels)."""
_ANY_FORMAT = 32
"""Added to zlib's window size to accept gzip and zlib headers."""

_NO_ADDRESS = ("", "", 0, 0)

# These are plain numbers, because reading a member of an enum takes 0.3 us in Python 3.11.
_STATUS_OK = int(HTTPStatus.OK)
_STATUS_SWITCHING = int(HTTPStatus.SWITCHING_PROTOCOLS)

_RECORD_TYPES = range(20, 25)
_RECORD_HEADER = 5
"""Length of the header of a TLS record: type, version (2 bytes), and length of the rest (2 bytes)."""
_TLS_MAJOR_VERSION = 3
TLS_LIMIT = 256 * 1024
"""Maximum number of bytes of TLS records that libcurl may process while it connects.

After that, it is the maximum for one exchange within one call into libcurl. OpenSSL processes any number of handshake
messages without returning. Meanwhile the event loop would stop, and no timeout would apply.
"""
_TLS_MESSAGE = 64
"""Number of bytes added for each piece of TLS data that libcurl reports, because even an empty message takes time."""


class Exchange:
    """A curl handle that keeps its options and makes one HTTP exchange at a time."""

    __slots__ = (
        "_action",
        "_address",
        "_at",
        "_began",
        "_body",
        "_bytes_left",
        "_content",
        "_has_read_record",
        "_head",
        "_opened",
        "_read",
        "_refused",
        "_sockets",
        "_status",
        "_tls_size",
        "_until",
        "_url",
        "answered",
        "curl",
        "flaw",
        "flooded",
        "is_reusable",
        "late",
        "may_have_been_sent",
        "stale_address",
    )

    def __init__(self, options: Mapping[int, object], sockets: Sockets) -> None:
        """Set the handle's options; ``sockets`` are the sockets of the multi handle."""
        self._sockets = sockets
        self._url = ""
        self._began = False
        self.stale_address: Address | None = None
        self.is_reusable = True
        self._opened: list[Descriptor] = []
        self._head: list[bytes] = []
        self._content = bytearray()
        self.curl = pycurl.Curl()
        callbacks = {
            pycurl.SOCKOPTFUNCTION: self._socket_opened,
            pycurl.PREREQFUNCTION: self._connected,
            pycurl.READFUNCTION: self._give_body,
            pycurl.HEADERFUNCTION: self._receive_line,
            pycurl.WRITEFUNCTION: self._receive_part,
        }
        if sockets.uses_tls:
            callbacks |= {pycurl.VERBOSE: True, pycurl.DEBUGFUNCTION: self._count}
        for option, value in (*options.items(), *callbacks.items()):
            self.curl.setopt(option, value)

    def prepare(self, url: str, headers: Sequence[bytes], body: bytes, until: float) -> None:
        """Set the next request and its deadline ``until``, a time on the `uptime` clock."""
        self.set_timeout(until)
        if url != self._url:
            self._url = url
            self.curl.setopt(pycurl.URL, url)
        self._body, self._at, self._until = body, 0, until
        self._read = self._action = self._tls_size = 0
        self._has_read_record = False
        self._address: Address = _NO_ADDRESS
        self._refused: bool | None = None
        self._bytes_left = HEAD_LIMIT
        self.may_have_been_sent = self.answered = self.late = self.flooded = False
        self.flaw = ""
        self.stale_address = None
        self._opened.clear()
        self.curl.setopt(pycurl.HTTPHEADER, headers)
        self.curl.setopt(pycurl.POSTFIELDSIZE, len(body))

    def set_timeout(self, until: float) -> None:
        """Set the deadline of the next transfer; ``until`` is a time on the `uptime` clock."""
        self.curl.setopt(pycurl.TIMEOUT_MS, max(1, math.ceil(1000 * (until - uptime()))))

    @property
    def descriptors(self) -> Sequence[Descriptor]:
        """The sockets that were opened for this exchange, or the socket of the reused connection."""
        return self._opened or self._sockets.descriptors_of(self._address)

    @property
    def address(self) -> Address | None:
        """The connection that this exchange uses or last used, or None after `end`."""
        return self._address if self._began else None

    def end(self) -> None:
        """Release the connection so that other exchanges may use it."""
        if self._began:
            self._sockets.end(self._address, answered=self.answered)
            self._began = False

    def clear(self) -> None:
        """Discard the request and the answer, so that an idle exchange keeps no memory for them."""
        self._body = b""
        self._head.clear()
        self._content.clear()
        self._opened.clear()

    def do_not_reuse(self) -> None:
        """Send no further request on this exchange's connection."""
        self._sockets.do_not_reuse(self._address)

    def has_status(self, code: int) -> bool:
        """Return whether a final status has arrived; ``code`` is libcurl's result.

        The status counts even if a later header is invalid or too long, but not if the connection broke before the
        last header.
        """
        if self.answered:
            return True
        return bool(self._head) and self._status >= _STATUS_OK and code in _BAD_HEADER | _TOO_LONG

    def answer(self, code: int) -> Answer:
        """Return the answer once its status has arrived; ``code`` is libcurl's result for the rest."""
        headers = {} if self._status // 100 == 2 else _headers(self._head)  # noqa: PLR2004 - 2xx, of which none is read
        flaw = _flaw(code) if self.answered else _flaw_of_head(code)
        body = bytes(self._content)
        if body[:2] in _COMPRESSED:
            decompressed = _decompressed(body, flaw)
            # an uncompressed text may begin with the same two bytes
            if decompressed is not None:
                body, flaw = decompressed
            elif "content-encoding" in _headers(self._head):
                body, flaw = b"", flaw or NOT_DECOMPRESSED
        return Answer(self._status, headers, body, flaw)

    # The following methods are callbacks, in the order in which libcurl calls them.

    def _socket_opened(self, socket: int, _purpose: int) -> int:
        opened = Descriptor.of(socket)
        opened.limit_buffer()
        self._opened.append(opened)
        return _CONTINUE

    def _connected(self, ip: str, own_ip: str, port: int, own_port: int) -> int:
        if self.may_have_been_sent:
            # libcurl would repeat the request by itself
            self.flaw = "the server asked for the request to be repeated over HTTP/1.1"
            return _ABORT
        # A process that freezes while it connects may wake after the request's time limit. By then, the follow-up may
        # have been cancelled, or sent by another process. These checks also detect a closed connection, on which a
        # request would have an unknown outcome.
        if uptime() > self._until:
            self.late = True
            return _ABORT
        self.end()
        self._address = ip, own_ip, port, own_port
        if not self._sockets.may_send(self._address, self._opened):
            self.stale_address = None if self._opened else self._address
            return _ABORT
        if self._opened:
            self._sockets.begin_counting(self._address, self._read)
        self._sockets.begin(self._address)
        self._began = True
        self._bytes_left = HEAD_LIMIT  # the head of the proxy's answer counted too
        return _CONTINUE

    def _give_body(self, size: int) -> bytes:
        self.may_have_been_sent = True
        part = self._body[self._at : self._at + size]
        self._at += len(part)
        return part

    def _count(self, kind: int, data: bytes) -> None:
        """Count the processed bytes of a TLS connection: those of the proxy's answer, and those of each record."""
        if kind == pycurl.INFOTYPE_SSL_DATA_IN:
            number = _RECORD_HEADER + int.from_bytes(data[3:]) if _is_record_header(data) else 0
            self._limit_tls(number)
            if not number:
                return
            if self._began:
                self._sockets.add_consumed(self._address, number)
                self._has_read_record = True
            else:
                self._read += number
        elif kind == pycurl.INFOTYPE_HEADER_IN and not self._began:
            self._read += len(data)
        elif kind == pycurl.INFOTYPE_TEXT and self._began and data.startswith(_CLOSING):
            # libcurl would read for up to two seconds until the endpoint also closes the connection
            self.flooded = self._sockets.finish(self._address) or self.flooded

    def _limit_tls(self, size: int) -> None:
        if self._began and self._action != self._sockets.action:
            self._action = self._sockets.action
            self._tls_size = 0
        self._tls_size += size + _TLS_MESSAGE
        if self._tls_size <= TLS_LIMIT or self.flooded:
            return
        self.flooded = True
        if self._began:
            self._sockets.shut(self._address)
        for each in self._opened:
            each.shut()

    def _receive_line(self, line: bytes) -> int | None:
        self._bytes_left -= len(line)
        if self._bytes_left < 0:
            self.flaw = LONG_HEAD
            return _STOP
        if self.answered:  # a trailer is not a header
            return None
        if not self._head:
            return self._begin_head(line) if self.may_have_been_sent else self._receive_proxy_line(line)
        if line in {b"\r\n", b"\n"}:
            return self._end_head()
        self._head.append(line)
        return None

    def _receive_proxy_line(self, line: bytes) -> int | None:
        if self._refused is None:
            self._refused = _ACCEPTED.match(line) is None
        if line not in {b"\r\n", b"\n"}:
            return None
        # libcurl would read the body of a refusal, even without end
        refused, self._refused = self._refused, None
        return _STOP if refused else None

    def _begin_head(self, line: bytes) -> int | None:
        # Part of a record may be left over from the previous answer. libcurl then reads it without a new record. With
        # HTTP/2, another exchange may have read the record.
        if not self._has_read_record and line.startswith(b"HTTP/1") and self._sockets.counts(self._address):
            self.flaw = "another answer had arrived before the request"
            return _STOP
        found = _STATUS_LINE.match(line)
        if found is None:
            self.flaw = "the status line is invalid" if line.strip() else "the header of the answer is empty"
            return _STOP
        self._status = int(found[1])
        self._head.append(line)
        return None

    def _end_head(self) -> int | None:
        status = self._status
        if status < _STATUS_OK and status != _STATUS_SWITCHING:
            self._head.clear()  # the head of the final answer follows
            return None
        if self._sockets.uses_tls:
            self._sockets.answer(self._address, http2=not self._head[0].startswith(b"HTTP/1"))
        self.answered = True
        self._bytes_left = BODY_LIMIT
        return _STOP if status == _STATUS_SWITCHING else None

    def _receive_part(self, part: bytes) -> int | None:
        self._content += part[: self._bytes_left]
        self._bytes_left -= len(part)
        return _STOP if self._bytes_left < 0 else None


def _is_record_header(data: bytes) -> bool:
    return len(data) == _RECORD_HEADER and data[0] in _RECORD_TYPES and data[1] == _TLS_MAJOR_VERSION


def _headers(head: Sequence[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in head[1:]:
        name, _, value = line.partition(b":")
        if (known := name.strip().lower()) in _READ_HEADERS:
            headers.setdefault(known.decode(), value.strip().decode(errors="replace"))
    return headers


def _flaw_of_head(code: int) -> str:
    return "a header of the answer is invalid" if code in _BAD_HEADER else LONG_HEAD


def _decompressed(body: bytes, flaw: str) -> tuple[bytes, str] | None:
    # libcurl would decompress several layers, and could spend its whole time on a few bytes
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | _ANY_FORMAT)
    try:
        found = decompressor.decompress(body, BODY_LIMIT)
    except zlib.error:
        return None
    if decompressor.unconsumed_tail:
        flaw = LONG
    return found, flaw or ("" if decompressor.eof else NOT_DECOMPRESSED)


def _flaw(code: int) -> str:
    if code == pycurl.E_OK:
        return ""
    if code in _TOO_LONG:
        return LONG
    if code == FLOODED:
        return "the answer is endless"
    if code == pycurl.E_OPERATION_TIMEDOUT:
        return LATE
    why = "the connection was closed here" if code == CLOSED else pycurl.easy_strerror(code)
    return f"the body of the answer is incomplete ({why})"
