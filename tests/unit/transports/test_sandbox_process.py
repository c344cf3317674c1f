"""Tests of the sandbox process: its ready message, clean exit and startup errors."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from typing import TYPE_CHECKING

import aiohttp

from followups.transports.sandbox import server
from unit.transports.doubles import BODY, fetch

if TYPE_CHECKING:
    import pytest


async def test_the_process_stops_with_open_requests() -> None:
    """The process prints one line when ready, and exits cleanly on SIGTERM."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "followups.transports.sandbox.server", "--port", "0", "--no-dedup",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    line = (await process.stdout.readline()).decode()
    url = line.removeprefix("The sandbox chat is ready at ").partition(" ")[0]
    async with aiohttp.ClientSession(url) as http:
        for _ in range(2):
            await fetch(http, "POST", "messages", BODY)
        assert (await fetch(http, "GET", "sandbox/summary"))[1]["duplicates"] == 1
        await fetch(http, "PUT", "sandbox/behaviour", {"kind": "slow", "delay": 60})
        slow = asyncio.create_task(fetch(http, "POST", "messages", BODY))
        async with http.get("sandbox/events") as stream:
            await stream.content.readline()
            process.send_signal(signal.SIGTERM)
            output, errors = await asyncio.wait_for(process.communicate(), 20)
        await asyncio.wait([slow])
        assert isinstance(slow.exception(), aiohttp.ClientError)
    assert (process.returncode, output, errors) == (0, b"", b"")


def test_a_port_in_use_stops_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    """If the port is in use, the sandbox prints one sentence and exits with 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert server.main(["--port", str(taken.getsockname()[1])]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("The sandbox cannot start: ")
    assert (said.err.count("\n"), said.out) == (1, "")


def test_a_secret_may_be_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sandbox's secret can come from the environment, which the process list does not show.

    If the secret is invalid, the sandbox does not start.
    """
    monkeypatch.setenv("FOLLOWUPS_TRANSPORT_SECRET", "not base64!")
    assert server.main([]) == 1
    assert "FOLLOWUPS_TRANSPORT_SECRET should be base64" in capsys.readouterr().err
