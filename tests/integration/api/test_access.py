"""Tests for the access log, and for the request id in each line and response."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from stack import wait_until
from web import FOLLOW_UPS, Api, start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stack import Stack


@pytest.fixture
def logged(stack: Stack) -> Iterator[Api]:
    """Return a client of a separate web process, which logs at the lowest level."""
    _, url = start(stack.processes, stack.environment() | {"FOLLOWUPS_LOG_LEVEL": "debug"})
    api = Api(url, stack.world)
    with api.client:
        yield api


def lines(stack: Stack, event: str, **fields: Any) -> list[dict[str, Any]]:
    """Wait for log lines of an event with the given values, and return the lines."""
    return wait_until(
        lambda: [line for line in stack.log_events(event, "web") if fields.items() <= line.items()], within=5
    )


def test_one_line_per_request(stack: Stack, logged: Api) -> None:
    """A request is logged in one line, without its query string and API key.

    The log line contains the request's id, method, path, status, duration, client, workspace and API key id.
    """
    answer = logged.get(FOLLOW_UPS, statuses="pending")
    request_id = answer.headers["x-request-id"]
    (line,) = lines(stack, "request", request_id=request_id)
    assert line.pop("duration_ms") > 0
    assert line.pop("timestamp")
    assert line == {
        "level": "info",
        "logger": "followups.api.access_log",
        "client": "127.0.0.1",
        "key_id": str(stack.world.scalar("SELECT id FROM api_keys")),
        "event": "request",
        "request_id": request_id,
        "method": "GET",
        "path": FOLLOW_UPS,
        "status": 200,
        "workspace_id": str(stack.world.workspace_id),
    }


@pytest.mark.parametrize(("given", "taken"), [("abc-1", True), ("a b", False), ("x" * 129, False), ("", False)])
def test_the_request_s_own_id(api: Api, given: str, *, taken: bool) -> None:
    """If a client sends a plain word of at most 128 characters as the request id, this id is kept."""
    answered = api.client.get("/healthz", headers={"x-request-id": given}).headers["x-request-id"]
    assert (answered == given) is taken
    assert answered


def test_transitions_have_the_requests_id(stack: Stack, logged: Api) -> None:
    """A state transition caused by a request is logged with that request's id and workspace."""
    created = logged.create()
    request_id = logged.patch(created, status="cancelled").headers["x-request-id"]
    (line,) = lines(stack, "transition", follow_up_id=created["id"])
    assert (line["request_id"], line["workspace_id"]) == (request_id, str(stack.world.workspace_id))


def test_a_request_without_a_key_has_no_workspace(stack: Stack, logged: Api) -> None:
    """On a reused connection, a request without a key is logged without a workspace."""
    url = httpx.URL(logged.url)
    with socket.create_connection((url.host, url.port or 80)) as connection:
        first, second = uuid4().hex, uuid4().hex
        head = "GET {} HTTP/1.1\r\nhost: x\r\nx-request-id: {}\r\n"
        mine = head.format(FOLLOW_UPS, first) + f"authorization: {logged.key}\r\n\r\n"
        unknown_keys = head.format(FOLLOW_UPS, second) + "connection: close\r\n\r\n"
        connection.sendall((mine + unknown_keys).encode())
        while connection.recv(65_536):
            pass
    assert lines(stack, "request", request_id=first)[0]["workspace_id"] == str(stack.world.workspace_id)
    (line,) = lines(stack, "request", request_id=second)
    assert (line["status"], line["workspace_id"]) == (401, None)


def test_successful_probes_are_logged_at_debug(stack: Stack, logged: Api) -> None:
    """A successful probe is logged at level debug, and a failing probe at info."""
    request_id = logged.client.get("/healthz").headers["x-request-id"]
    assert lines(stack, "request", request_id=request_id)[0]["level"] == "debug"
    request_id = logged.client.get("/readyz").headers["x-request-id"]
    (line,) = lines(stack, "request", request_id=request_id)
    assert (line["level"], line["status"]) == ("info", 503)  # `/readyz` fails because no tick has run yet


def test_refused_requests_are_logged(stack: Stack, logged: Api) -> None:
    """A request with an oversized body or an unknown path is logged like any other."""
    answer = logged.client.post(FOLLOW_UPS, content=b"x" * (1024 * 1024 + 1))
    (line,) = lines(stack, "request", request_id=answer.headers["x-request-id"])
    assert (line["status"], line["workspace_id"]) == (413, None)
    answer = logged.client.get("/" + "x" * 1000)
    (line,) = lines(stack, "request", request_id=answer.headers["x-request-id"])
    assert (line["status"], len(line["path"])) == (404, 200)


def test_a_disconnected_clients_request_is_logged(stack: Stack, logged: Api) -> None:
    """If a client disconnects before the response begins, the request is logged without a status."""
    url = httpx.URL(logged.url)
    request_id = os.urandom(8).hex()
    head = f"POST {FOLLOW_UPS} HTTP/1.1\r\nhost: x\r\nx-request-id: {request_id}\r\ncontent-length: 9\r\n"
    head += f"authorization: {logged.key}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 80)) as client:
        client.sendall(head.encode() + b"x")
    (line,) = lines(stack, "request", request_id=request_id)
    assert line["status"] is None
