"""Tests that search all log lines, messages and events for message texts and secrets."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import redis
from celery import Celery
from sqlalchemy import make_url

import web
from followups.embedded import free_port
from followups.embedded.processes import argv, search_path
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stack import Stack

ATTEMPT = frozenset(
    (
        *("timestamp", "level", "logger", "event", "follow_up_id", "chat_id", "workspace_id"),
        *("attempt", "outcome", "status_code", "duration_ms", "lag_ms", "task_id"),
    )
)
"""The complete set of keys in the log line of an attempt."""

FOR_PEOPLE = {"", "worker: Warm shutdown (MainProcess)"}
"""The text that Celery prints on stdout when it is stopped."""

LOGS = ("worker", "beat", "web", "flower")

# The database rejects one follow-up when it is inserted and another when it is sent. Both errors quote the row.
QUOTING = """
    CREATE FUNCTION quote_it() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.message LIKE '%refuse-insert%' OR (TG_OP = 'UPDATE' AND NEW.message LIKE '%refuse-sent%'
                                                  AND NEW.status = 'sent') THEN
            RAISE EXCEPTION 'no: %', NEW.message USING DETAIL = NEW.message, ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER quote_it BEFORE INSERT OR UPDATE ON follow_ups FOR EACH ROW EXECUTE FUNCTION quote_it()
"""


@dataclass
class Secrets:
    """The secrets to search for, by name."""

    text: str = field(default_factory=lambda: f"text-{secrets.token_hex(12)}")
    transport: str = field(default_factory=lambda: base64.b64encode(secrets.token_bytes(32)).decode())
    database: str = field(default_factory=lambda: f"pa55-{secrets.token_hex(12)}")
    strangers_key: str = field(default_factory=lambda: f"fu_{secrets.token_hex(12)}")
    key: str = ""
    broker: str = ""
    flower: str = field(default_factory=lambda: f"pa55-{secrets.token_hex(12)}")

    def found_in(self, heap: str) -> list[str]:
        """Return the names of the secrets in the text."""
        assert all(vars(self).values())
        return [name for name, value in vars(self).items() if value in heap]


@dataclass
class BrokerTraffic:
    """Every command sent to the broker, and every event received by Celery's event receiver."""

    commands: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def messages(self) -> list[str]:
        """Return the recorded commands, each with its base64 parts decoded."""
        return [command + unpacked(command) for command in self.commands]


def unpacked(command: str) -> str:
    """Return the decoded bodies of the Celery messages in a Redis command."""
    bodies = []
    for start in [position for position, sign in enumerate(command) if sign == "{"][:1]:
        with suppress(ValueError, KeyError, TypeError):
            message, _ = json.JSONDecoder().raw_decode(command[start:].encode().decode("unicode_escape"))
            bodies.append(base64.b64decode(message["body"]).decode())
    return " ".join(bodies)


@contextmanager
def record_traffic(broker_url: str) -> Iterator[BrokerTraffic]:
    """Record Flower's events and all broker traffic, as a client with the password sees them."""
    traffic, done, end = BrokerTraffic(), threading.Event(), uuid4().hex
    number = int(broker_url.rpartition("/")[2])

    def monitor() -> None:
        with redis.Redis.from_url(broker_url) as client, client.monitor() as monitored:
            for heard in monitored.listen():
                if heard["command"] == f"ECHO {end}":
                    return
                if int(heard["db"]) == number:  # other databases belong to tests that run concurrently
                    traffic.commands.append(heard["command"])

    def receive() -> None:
        app = Celery(broker=broker_url, set_as_current=False)
        app.conf.broker_transport_options = {"global_keyprefix": "followups:"}
        with app.connection() as connection:

            def hear(event: Any) -> None:
                traffic.events.append(event)
                # frequent tick events keep `capture` from timing out, so the handler also checks whether to stop
                receiver.should_stop = done.is_set()

            receiver = app.events.Receiver(connection, handlers={"*": hear})
            while not done.is_set():
                with suppress(TimeoutError):
                    receiver.capture(limit=None, timeout=0.5, wakeup=False)

    threads = [threading.Thread(target=each) for each in (monitor, receive)]
    for thread in threads:
        thread.start()
    try:
        yield traffic
    finally:
        done.set()
        with redis.Redis.from_url(broker_url) as client:
            client.echo(end)
        for thread in threads:
            thread.join()


def start_everything(stack: Stack, hidden: Secrets) -> tuple[str, str]:
    """Start the Procfile's processes and the chat; return the URLs of web and Flower."""
    flower_port = free_port()
    environment = stack.environment() | {
        "PATH": search_path(),
        "FLOWER_PORT": str(flower_port),
        "FLOWER_BASIC_AUTH": f"me:{hidden.flower}",
    }
    for name in ("beat", "worker", "flower"):
        stack.processes.spawn(name, argv(name), environment=environment)
    stack.sandbox()
    url = web.start(stack.processes, environment)[1]
    wait_until(lambda: get(f"{url}/readyz"), within=60)
    flower = f"http://127.0.0.1:{flower_port}"
    wait_until(lambda: get(f"{flower}/healthcheck"), within=60)
    return url, flower


def get(url: str, password: str = "") -> str:
    """Return the response's text, or an empty string if there is no response."""
    basic = base64.b64encode(f"me:{password}".encode()).decode()
    request = urllib.request.Request(url, headers={"authorization": f"Basic {basic}"})  # noqa: S310 - our own loopback URL
    with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - the same
        text: str = answer.read().decode()
        return text
    return ""


def play(stack: Stack, api: web.Api, hidden: Secrets) -> dict[str, str]:
    """Cause every type of outcome for follow-ups with secret texts; return their ids."""
    quoting = f"no: {hidden.text}"
    chats = {name: api.chat() for name in ("sent", "retried", "rejected", "cancelled", "replied", "unsettled")}
    stack.behave(chats["retried"], kind="fail", status=500, times=2, body=quoting)
    stack.behave(chats["rejected"], kind="reject", status=403, body=quoting)
    texts = {"unsettled": f"{hidden.text} refuse-sent"}
    due = {name: web.in_days(1 if name in {"cancelled", "replied"} else 0) for name in chats}
    created = {name: api.create(chats[name], due[name], texts.get(name, hidden.text)) for name in chats}
    api.patch(created["cancelled"], status="cancelled", reason=f"because of {hidden.text}")
    api.message(chats["replied"], "user")
    body = {"chatId": chats["sent"], "dueDate": web.in_days(0), "message": f"{hidden.text} refuse-insert"}
    assert api.post(web.FOLLOW_UPS, body).status_code == 500
    assert api.post(web.FOLLOW_UPS, body | {"dueDate": hidden.text}).status_code == 422
    assert api.post(web.FOLLOW_UPS, body, authorization=hidden.strangers_key).status_code == 401
    assert api.client.post(web.FOLLOW_UPS, content=f'{{"message": "{hidden.text}').status_code == 422
    return {name: each["id"] for name, each in created.items()}


@pytest.mark.parametrize("level", ["info", "debug"])
def test_no_text_or_secret_is_revealed(stack: Stack, level: str) -> None:
    """Whatever happens to a follow-up, no message text, key or password is revealed.

    The test searches every log line, broker command, message, event and Flower page.
    """
    hidden = Secrets()
    url = make_url(stack.settings.database_url.get_secret_value())
    broker_url = stack.settings.broker_url.get_secret_value()
    hidden.broker = make_url(broker_url).password or ""
    stack.options |= {
        "FOLLOWUPS_DATABASE_URL": url.set(password=hidden.database).render_as_string(hide_password=False),
        "FOLLOWUPS_TRANSPORT_SECRET": f"whsec_{hidden.transport}",
        "FOLLOWUPS_LOG_LEVEL": level,
    }
    stack.world.alter(QUOTING)
    with record_traffic(broker_url) as traffic:
        api_url, flower_url = start_everything(stack, hidden)
        api = web.Api(api_url, stack.world)
        hidden.key = api.key
        with api.client:
            ids = play(stack, api, hidden)
            ended = [each for name, each in ids.items() if name != "unsettled"]
            wait_until(lambda: all(api.read({"id": each})["status"] != "pending" for each in ended), within=60)
            wait_until(lambda: stack.log_events("step_failed"), within=20)
            wait_until(lambda: ids["sent"] in get(f"{flower_url}/api/tasks?limit=10000", hidden.flower), within=20)
            shown = [
                get(f"{flower_url}/api/tasks?limit=10000", hidden.flower),
                get(f"{flower_url}/api/workers", hidden.flower),
                get(f"{api_url}/metrics"),
            ]
        stack.stop()

    told = {name: (stack.processes.logs / f"{name}.log").read_text() for name in LOGS}
    told |= {
        "broker": "\n".join(traffic.messages()),
        "events": json.dumps(traffic.events),
        "pages": "".join(shown),
    }
    assert {place: found for place, heap in told.items() if (found := hidden.found_in(heap))} == {}

    _assert_it_was_a_full_run(stack, told, ids)
    for name in LOGS:
        _assert_one_format(told[name], name)


def _assert_it_was_a_full_run(stack: Stack, told: dict[str, str], ids: dict[str, str]) -> None:
    """Check that the run produced enough output, so that the search for secrets is meaningful."""
    outcomes = {line["outcome"] for line in stack.log_events("attempt")}
    assert {"sent", "retry", "rejected"} <= outcomes
    assert {frozenset(line) for line in stack.log_events("attempt")} == {ATTEMPT}
    codes = {
        (line["status"], line["code"]) for name in ("worker", "web") for line in stack.log_events("transition", name)
    }
    assert {("sent", ""), ("failed", "rejected"), ("cancelled", "user_replied")} <= codes
    assert stack.log_events("request_failed", "web")
    assert stack.log_events("tick")
    for place in ("worker", "broker", "events", "pages"):
        assert ids["sent"] in told[place], place
    assert "task-succeeded" in told["events"]


def _assert_one_format(log: str, name: str) -> None:
    """Check that every log line is a JSON object with time, level, logger and event."""
    for line in log.splitlines():
        if line in FOR_PEOPLE:
            continue
        assert line.startswith("{"), f"{name} wrote: {line}"
        assert list(json.loads(line))[:4] == ["timestamp", "level", "logger", "event"]
