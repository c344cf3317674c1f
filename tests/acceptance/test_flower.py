"""Tests that Flower requires a password on public addresses, and shows tasks in readable form."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from followups.embedded import free_port
from stack import CELERY, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from stack import Stack


def start_flower(stack: Stack, *arguments: str, **environment: str) -> str:
    """Start Flower on a free port; return its loopback URL once it answers."""
    port = free_port()
    command = [*CELERY, "flower", f"--port={port}", *arguments]
    stack.processes.spawn("flower", command, environment=stack.environment() | environment)
    wait_until(lambda: status(f"http://127.0.0.1:{port}/healthcheck") == 200, within=60)
    return f"http://127.0.0.1:{port}"


def status(url: str, authorization: str = "") -> int:
    """Return the status code of a GET request, or 0 if there is no answer."""
    headers = {"authorization": f"Basic {base64.b64encode(authorization.encode()).decode()}"} if authorization else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - our own loopback URL
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - our own loopback URL
            code: int = answer.status
            return code
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--address=0.0.0.0"], {}),
        (["--address=::"], {}),
        ([], {"FLOWER_ADDRESS": "0.0.0.0"}),  # noqa: S104 - what must be refused
        (["--address=0.0.0.0"], {"FLOWER_BASIC_AUTH": ""}),
        (["--address=0.0.0.0", "--basic-auth=me:"], {}),
    ],
)
def test_a_public_address_requires_a_password(stack: Stack, arguments: list[str], environment: dict[str, str]) -> None:
    """If Flower listens on a public address without a password, Flower exits and says what to set."""
    command = [*CELERY, "flower", f"--port={free_port()}", *arguments]
    own = os.environ | stack.environment() | environment
    ran = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    (sentence,) = ran.stderr.splitlines()
    assert sentence.startswith("followups: Flower on the address ")
    assert "set FLOWER_BASIC_AUTH=user:password" in sentence


def test_flower_with_a_password(stack: Stack) -> None:
    """If a password is set, Flower requires it on any address and never logs it."""
    # A Kubernetes Service named "flower" sets FLOWER_PORT to something other than a port number.
    kubernetes = {"FLOWER_PORT": "tcp://10.96.0.7:5555"}
    url = start_flower(stack, "--address=0.0.0.0", FLOWER_BASIC_AUTH="me:pa55w0rd", **kubernetes)
    assert status(f"{url}/workers") == 401
    assert [status(f"{url}/metrics"), status(f"{url}/metrics", "me:pa55w0rd")] == [401, 200]
    assert status(f"{url}/api/tasks") == 401
    assert status(f"{url}/workers", "me:wrong") == 401
    assert status(f"{url}/workers", "me:pa55w0rd") == 200
    assert "pa55w0rd" not in (stack.processes.logs / "flower.log").read_text()


def test_flowers_password_from_a_file(stack: Stack, tmp_path: Path) -> None:
    """Flower reads its password from the file that FLOWER_BASIC_AUTH_FILE names."""
    secret = tmp_path / "flower"
    secret.write_text("me:pa55w0rd\n")
    url = start_flower(stack, FLOWER_BASIC_AUTH_FILE=str(secret))
    assert [status(f"{url}/workers"), status(f"{url}/workers", "me:pa55w0rd")] == [401, 200]


@pytest.mark.parametrize("content", [None, "", "me:"])
def test_a_file_without_flowers_password(stack: Stack, tmp_path: Path, content: str | None) -> None:
    """If the file in FLOWER_BASIC_AUTH_FILE is missing or has no password, Flower exits with an error."""
    secret = tmp_path / "flower"
    if content is not None:
        secret.write_text(content)
    own = os.environ | stack.environment() | {"FLOWER_BASIC_AUTH_FILE": str(secret)}
    command = [*CELERY, "flower", f"--port={free_port()}"]
    ran = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("followups: FLOWER_BASIC_AUTH_FILE should name a ")


def test_flower_listens_on_loopback_by_default(stack: Stack) -> None:
    """Without an address and a password, Flower listens only on this machine."""
    url = start_flower(stack)
    port = int(url.rpartition(":")[2])
    assert listening(port) == {"0100007F"}  # 127.0.0.1 in the kernel's format


def test_no_api_without_a_password(stack: Stack) -> None:
    """Without a password, Flower's API is disabled, because any web page in a local browser could call it."""
    command = [*CELERY, "flower", f"--port={free_port()}"]
    own = os.environ | stack.environment() | {"FLOWER_UNAUTHENTICATED_API": "true"}
    ran = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    (sentence,) = ran.stderr.splitlines()
    assert sentence.startswith("followups: FLOWER_UNAUTHENTICATED_API would let every program and web page send tasks")


def listening(port: int) -> set[str]:
    """Return the IPv4 addresses that listen on the port, in the kernel's hexadecimal format."""
    with open("/proc/net/tcp", encoding="ascii") as table:  # noqa: PTH123 - not a file of this machine's own
        rows = [line.split() for line in table][1:]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, each in places if int(each, 16) == port}


def test_flower_shows_ticks_and_deliveries(stack: Stack) -> None:
    """Flower names each tick and delivery, and shows a delivery's number of follow-ups and first id."""
    url = start_flower(stack, FLOWER_BASIC_AUTH="me:pa55w0rd")
    stack.start()

    def shown() -> list[dict[str, Any]]:
        own = {"authorization": f"Basic {base64.b64encode(b'me:pa55w0rd').decode()}"}
        request = urllib.request.Request(f"{url}/api/tasks", headers=own)  # noqa: S310 - our own loopback URL
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - as above
            tasks: dict[str, dict[str, Any]] = json.loads(answer.read())
        return list(tasks.values())

    # Flower answers requests before it receives events, so a delivery before the first tick could be missed.
    wait_until(lambda: {task["name"] for task in shown()} == {"followups.dispatch_due"})
    follow_up = stack.world.follow_up()
    stack.wait_until_done(follow_up)
    wait_until(lambda: {task["name"] for task in shown()} == {"followups.dispatch_due", "followups.deliver"})
    (delivery,) = [task["args"] for task in shown() if task["name"] == "followups.deliver"]
    assert delivery == f"1 follow-up, {follow_up}"
