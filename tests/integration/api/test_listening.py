"""Addresses on which the web process listens: IPv6, IPv4 and a separate port for metrics."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from followups.embedded import Processes, answers, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.embedded import Child
    from followups.settings import Settings

KUBERNETES = {"PORT": "tcp://10.96.0.7:80"}
"""Environment variables that Kubernetes sets for Services; their names resemble those of settings."""
ARGV = [sys.executable, "-m", "followups.api"]


@pytest.fixture
def web(settings: Settings) -> Iterator[tuple[Child, int, int]]:
    """Start a web process with a separate metrics port; return the process and both ports."""
    port, metrics = free_port(), free_port()
    own = KUBERNETES | {"FOLLOWUPS_METRICS_PORT": str(metrics)}
    with Processes() as processes:
        child = processes.spawn(
            "web",
            [*ARGV, "--port", str(port)],
            environment=settings.environment() | own,
            ready=answers(f"http://127.0.0.1:{port}/healthz"),
        )
        yield child, port, metrics


def test_every_address_and_two_ports(web: tuple[Child, int, int]) -> None:
    """The web process listens on IPv6 and IPv4, and only the metrics port serves `/metrics`.

    The metrics port serves no other path.
    """
    child, port, metrics = web
    hosts = ["127.0.0.1", "[::1]"] if socket.has_dualstack_ipv6() else ["127.0.0.1"]
    for host in hosts:
        for path, statuses in {"/healthz": (200, 404), "/metrics": (404, 200), "/docs": (200, 404)}.items():
            found = [httpx.get(f"http://{host}:{each}{path}").status_code for each in (port, metrics)]
            assert (host, path, *found) == (host, path, *statuses)
    ran = subprocess.run(
        [*ARGV, "--port", str(port)], env=child.command.environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert (
        ran.stderr == f"followups: web cannot listen on port {port}: Address already in use; set PORT to a free one.\n"
    )


def test_health_with_the_port_of_a_service(web: tuple[Child, int, int]) -> None:
    """The `health` command ignores a PORT set by Kubernetes; without --port, it uses the default port."""
    command = [sys.executable, "-m", "followups.cli", "health", "web"]
    for more, said in (([], "8000"), (["--port", str(web[1])], str(web[1]))):
        ran = subprocess.run(
            [*command, *more], env=os.environ | KUBERNETES, capture_output=True, text=True, check=False
        )
        assert f"127.0.0.1:{said}" in ran.stdout + ran.stderr
