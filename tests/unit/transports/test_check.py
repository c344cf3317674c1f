"""`check` sends no message and reports in one sentence whether the receiver can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from followups.errors import FollowUpsError
from followups.transports.http import HttpTransport
from stack import wait_until
from unit.transports.doubles import answer, listening, open_files, scripted, settings_for


async def test_check_finds_a_listening_host_and_sends_nothing() -> None:
    """`check` connects to a listening host, closes the connection and reports success."""
    async with scripted(answer(200)) as server:
        said = await HttpTransport(settings_for(f"{server.url}/messages?token=secret")).check()
        assert said == f"{server.url}/messages accepts connections over TCP; no message was sent."
        assert server.requests == []


async def test_check_leaves_no_file_open(free_port: int) -> None:
    """`check` closes all files and sockets that it has opened, even if it fails."""
    transport = HttpTransport(settings_for(f"http://127.0.0.1:{free_port}"))
    before = 0
    for _ in range(10):
        with pytest.raises(FollowUpsError):
            await transport.check()
        before = before or open_files()
    # connections are closed in another thread
    await asyncio.to_thread(wait_until, lambda: open_files() <= before)


async def test_check_names_the_address_that_refuses(free_port: int) -> None:
    """`check` names the address that rejects connections, without its password, and gives advice."""
    url = f"http://user:hunter2@127.0.0.1:{free_port}/messages"
    with pytest.raises(FollowUpsError) as caught:
        await HttpTransport(settings_for(url)).check()
    said = str(caught.value)
    assert said.startswith(f"http://user:***@127.0.0.1:{free_port}/messages cannot be reached: Connection refused; ")
    assert said.endswith("correct FOLLOWUPS_TRANSPORT_URL.")


async def test_check_names_a_host_that_is_not_found() -> None:
    """`check` distinguishes an unknown host name from a host that does not answer."""
    with pytest.raises(FollowUpsError, match=r"http://nowhere\.invalid cannot be reached: the host name was not found"):
        await HttpTransport(settings_for("http://nowhere.invalid")).check()


async def test_check_waits_no_longer_than_a_call() -> None:
    """`check` gives up after the transport timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(FollowUpsError, match=r"no connection within 0\.2 s"):
            await HttpTransport(settings_for(url, transport_timeout=0.2)).check()


async def test_check_reports_a_failed_tls_handshake(no_tls: str) -> None:
    """For an https URL, `check` also performs the TLS handshake and reports its failure."""
    with pytest.raises(FollowUpsError, match="TLS failed"):
        await HttpTransport(settings_for(no_tls)).check()


async def test_check_reads_no_more_of_a_proxys_refusal_than_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a proxy refuses the tunnel with an endless body, `check` names the proxy's status immediately."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        writer.write(b"HTTP/1.1 407 No\r\ntransfer-encoding: chunked\r\n\r\n1;")
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"x" * 10_000)
                await writer.drain()
                await asyncio.sleep(0)  # because `drain` may return without yielding to the event loop

    async with listening(refuse) as url, asyncio.timeout(3):
        monkeypatch.setenv("HTTPS_PROXY", url)
        with pytest.raises(FollowUpsError, match="the proxy answered HTTP 407"):
            await HttpTransport(settings_for("https://127.0.0.1:9")).check()
