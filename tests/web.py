"""The REST API in a separate process, and a client with a separate workspace."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
from sqlalchemy.orm import Session

from databases import create_database, drop_database, url_of
from followups.api.app import create_app
from followups.api.server import Server, config_of
from followups.embedded import answers, free_port
from followups.settings import load_settings
from followups.store import api_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from followups.embedded import Child, Processes
    from followups.settings import Settings
    from world import World

ROOT = Path(__file__).parent.parent
FOLLOW_UPS = "/api/v1/chat-message-follow-ups"
CHATS = "/api/v1/chats"
CHAT_MESSAGES = "/api/v1/chat-messages"
PROBLEM = "application/problem+json"


def command(name: str) -> list[str]:
    """Return the arguments of a Procfile line."""
    lines = dict(line.split(":", 1) for line in (ROOT / "Procfile").read_text().splitlines() if ":" in line)
    return shlex.split(lines[name])


def start(processes: Processes, environment: dict[str, str], name: str = "web") -> tuple[Child, str]:
    """Start the Procfile's `web` process on a free port; return the process and its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    child = processes.spawn(
        name,
        command("web"),
        environment=environment | {"PORT": str(port), "PATH": path},
        ready=answers(f"{url}/healthz"),
    )
    return child, url


def key_of(world: World) -> tuple[UUID, str]:
    """Create an API key in the workspace of ``world``; return its id and the key."""
    with Session(world.engine) as session, session.begin():
        row, key = api_keys.create(session, world.workspace_id)
        return row.id, key


def in_days(days: float) -> str:
    """Return the time ``days`` days from now, in the format that clients send."""
    return (datetime.now(UTC) + timedelta(days=days)).isoformat()


@contextmanager
def settings_on_database(prefix: str, postgres_url: str, template: str, broker_url: str) -> Iterator[Settings]:
    """Yield settings for a migrated database of this test process, and drop the database afterwards."""
    name = f"{prefix}_{uuid4().hex}"
    create_database(postgres_url, name, template)
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    yield load_settings(
        database_url=url_of(postgres_url, name),
        broker_url=f"{broker_url.rpartition('/')[0]}/{number}",
        transport_url="http://127.0.0.1:9/",
        tick_interval=timedelta(seconds=1),
        log_format="json",
    )
    drop_database(postgres_url, name)


@contextmanager
def served(settings: Settings, nudge: Callable[[], None] = lambda: None) -> Iterator[tuple[str, int]]:
    """Serve the application in a thread of this process; yield its URL."""
    application = create_app(settings, nudge)
    running = Server(config_of(application))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            running.should_exit = True
            thread.join()


def client_of(place: tuple[str, int], key: str = "") -> httpx.Client:
    """Return an HTTP client that sends this API key."""
    url = f"http://{place[0]}:{place[1]}"
    return httpx.Client(base_url=url, headers={"authorization": key}, timeout=20, verify=False)  # noqa: S501 - no TLS


@dataclass
class Api:
    """An API client whose key belongs to a separate workspace."""

    url: str
    world: World
    key_id: UUID = field(init=False)
    key: str = field(init=False)
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.key_id, self.key = key_of(self.world)
        # Certificates are loaded only for TLS, because loading takes a tenth of a second.
        headers = {"authorization": self.key}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=20, verify=False)  # noqa: S501

    def get(self, path: str, **parameters: Any) -> httpx.Response:
        """Send a GET request."""
        return self.client.get(path, params=parameters or None)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """Send a POST request with a JSON body."""
        return self.client.post(path, json=body, headers=headers)

    def chat(self, channel: str = "api", *roles: str) -> str:
        """Create a chat with one message from each of these roles; return the chat's id."""
        chat_id = str(uuid4())
        assert self.client.put(f"{CHATS}/{chat_id}", json={"channel": channel}).status_code == 201
        for role in roles or ("agent",):
            self.message(chat_id, role)
        return chat_id

    def message(self, chat_id: str, role: str, **more: Any) -> httpx.Response:
        """Report a chat message to the API."""
        return self.post(CHAT_MESSAGES, {"id": str(uuid4()), "chatId": chat_id, "role": role} | more)

    def create(self, chat_id: str | None = None, due: str | None = None, text: str = "Still there?") -> dict[str, Any]:
        """Create a follow-up, by default due in two days in a new chat."""
        body = {"chatId": chat_id or self.chat(), "dueDate": due or in_days(2), "message": text}
        answer = self.post(FOLLOW_UPS, body)
        assert answer.status_code == 201, answer.text
        created: dict[str, Any] = answer.json()
        return created

    def patch(self, follow_up: dict[str, Any], **changes: Any) -> httpx.Response:
        """Change a follow-up with a PATCH request."""
        return self.client.patch(f"{FOLLOW_UPS}/{follow_up['id']}", json=changes)

    def read(self, follow_up: dict[str, Any]) -> dict[str, Any]:
        """Read a follow-up with a GET request."""
        answer = self.get(f"{FOLLOW_UPS}/{follow_up['id']}")
        assert answer.status_code == 200
        found: dict[str, Any] = answer.json()
        return found

    def ids(self, **parameters: Any) -> list[str]:
        """List follow-ups; return their ids."""
        answer = self.get(FOLLOW_UPS, **parameters)
        assert answer.status_code == 200, answer.text
        return [one["id"] for one in answer.json()]


def is_problem(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """Check that a response is the given problem in the format of RFC 9457; return its document."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    problem: dict[str, Any] = answer.json()
    assert problem["type"].endswith(f"/{slug}"), problem
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


def pointers(problem: dict[str, Any]) -> list[str]:
    """Return the fields to which the problem document points."""
    return [error["pointer"] for error in problem["errors"]]
