"""File descriptors of libcurl's sockets, which libcurl may close at any time, and whose numbers are then used again."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

BUFFER = 128 * 1024
"""Size of a socket's receive buffer in bytes. libcurl may have to read the whole buffer before it closes the socket."""

_BYTES_RECEIVED = struct.Struct("=128xQ")
"""The number of bytes that a connection has received, in Linux's ``struct tcp_info`` (since Linux 4.1)."""


class Descriptor(NamedTuple):
    """The file descriptor of one of libcurl's sockets.

    The device and the inode distinguish the socket from a later socket with the same number. Methods may be called from
    any thread, unless they say otherwise.
    """

    number: int
    device: int
    inode: int

    @classmethod
    def of(cls, number: int) -> Self:
        """Return the descriptor of an open socket."""
        found = os.fstat(number)
        return cls(number, found.st_dev, found.st_ino)

    def query(self, read_from: Callable[[socket.socket], T]) -> T | None:
        """Return what ``read_from`` returns for the socket, or None if libcurl has closed the socket."""
        try:
            # libcurl may close the socket in another thread at any time, but not this copy
            copy = os.dup(self.number)
        except OSError:
            return None
        try:
            return self._read(copy, read_from)
        finally:
            os.close(copy)

    def limit_buffer(self) -> None:
        """Limit how much a new socket receives before it is read."""
        self.query(lambda opened: opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER))

    def shut(self) -> None:
        """Shut the socket down and discard what has arrived, so that libcurl reads nothing more from it."""
        self.query(_shut)

    def local_port(self) -> int | None:
        """Return the socket's local port, or None if libcurl has closed the socket.

        Call this method only in the thread that uses libcurl. It needs no further file descriptor.
        """
        return self._read(self.number, _local_port)

    def unread(self) -> int:
        """Return how many bytes have arrived that libcurl has not read, or 0 if that is not known."""
        return self.query(_unread) or 0

    def received(self) -> int:
        """Return how many bytes have arrived since the connection was opened, or 0 if that is not known."""
        return self.query(_received) or 0

    def consumed(self) -> int:
        """Return how many bytes libcurl has read since the connection was opened, or 0 if that is not known."""
        received = self.received()
        return received and received - self.unread()

    def _read(self, number: int, read_from: Callable[[socket.socket], T]) -> T | None:
        try:
            if Descriptor.of(number)[1:] != self[1:]:
                return None
            # The family is not looked up, because `read_from` does not depend on it.
            opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, number)
        except OSError:  # for example if this is not a socket
            return None
        try:
            return read_from(opened)
        except OSError:  # for example if the connection was reset
            return None
        finally:
            opened.detach()


def _shut(opened: socket.socket) -> None:
    opened.shutdown(socket.SHUT_RDWR)
    # Linux still returns what has arrived before. If more arrives, Linux resets the connection.
    while opened.recv(BUFFER, socket.MSG_DONTWAIT | socket.MSG_TRUNC):
        pass


def _local_port(opened: socket.socket) -> int:
    return int(opened.getsockname()[1])


def _unread(opened: socket.socket) -> int:
    return int.from_bytes(fcntl.ioctl(opened, termios.FIONREAD, bytes(4)), sys.byteorder)


def _received(opened: socket.socket) -> int:
    info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
    return int(_BYTES_RECEIVED.unpack(info)[0]) if len(info) == _BYTES_RECEIVED.size else 0
