"""Tests of calls while the process can open no more files, or start no more threads."""

from __future__ import annotations

import os
import resource
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pycurl
import pytest

from followups.transports.http import HttpTransport
from followups.transports.http_client import NO_RESOURCES
from followups.transports.port import Retry, Sent, Snoozed
from unit.transports.doubles import a_delivery, answer, opened, scripted, settings_for

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def no_more_files() -> Iterator[None]:
    """Lower this process's limit on open files, and open files until the limit is reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in opened:
            os.close(each)


def cannot_start(_thread: threading.Thread) -> None:
    """Fail as `threading.Thread.start` does if the limit on threads is reached."""
    message = "can't start new thread"
    raise RuntimeError(message)


async def test_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, calls are snoozed, and connections are closed without a thread."""
    async with scripted(answer(200)) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", cannot_start)
            assert await transport.send(a_delivery()) == Snoozed(NO_RESOURCES)
        assert await transport.send(a_delivery()) == Sent(None, 200)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", cannot_start)
            await transport.close()
        await transport.open()
        assert await transport.send(a_delivery()) == Sent(None, 200)


async def test_no_thread_for_a_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no host was found, and no thread can be started, the call is snoozed."""
    async with opened(HttpTransport(settings_for("http://no-such-host.invalid/"))) as transport:
        not_found = Retry("no connection: the host name was not found (DNS)")
        assert await transport.send(a_delivery()) == not_found
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", cannot_start)
            assert await transport.send(a_delivery()) == Snoozed(NO_RESOURCES)
        assert await transport.send(a_delivery()) == not_found


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), pycurl.error()])
async def test_no_file_for_libcurl(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the limit on open files is reached before libcurl is set up, calls are snoozed."""

    def fail() -> None:
        raise error

    async with scripted(answer(200)) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        with monkeypatch.context() as patch:
            patch.setattr("select.epoll" if isinstance(error, OSError) else "pycurl.CurlMulti", fail)
            assert await transport.send(a_delivery()) == Snoozed(NO_RESOURCES)
        assert await transport.send(a_delivery()) == Sent(None, 200)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
async def test_no_file_for_a_connection(host: str) -> None:
    """If no connection can be opened because of the limit on open files, the call is snoozed."""
    async with scripted(answer(200)) as server:
        url = server.url.replace("127.0.0.1", host)
        async with opened(HttpTransport(settings_for(url))) as transport:
            transport._client._connections()  # noqa: SLF001 - not public
            with no_more_files():
                assert await transport.send(a_delivery()) == Snoozed(NO_RESOURCES)
            expected = Retry("no connection: the host name was not found (DNS)") if "such" in host else Sent(None, 200)
            assert await transport.send(a_delivery()) == expected
