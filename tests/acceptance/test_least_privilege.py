"""Tests that the database roles and broker users created from deploy/ have sufficient permissions."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest
import redis

import web
from conftest import brisk_settings
from databases import SERVICE, make_roles, url_as
from followups.database import make_engine
from followups.embedded import EmbeddedPostgres, EmbeddedValkey, Processes, answers, free_port, memory_directory
from followups.schema import migrate
from stack import CELERY, Stack, wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """Return the superuser's URL of a database created by roles.sql."""
    with EmbeddedPostgres(parent=memory_directory()) as server:
        make_roles(server.url())
        yield server.url(SERVICE)


def users(admin: redis.Redis) -> dict[str, str]:
    """Create the broker users of users.acl; return their passwords."""
    found = {}
    for line in (DEPLOY / "users.acl").read_text().splitlines():
        _, name, *rules = line.split()
        if name != "default":  # the test itself needs the user default
            found[name] = uuid4().hex
            admin.execute_command(
                "ACL", "SETUSER", name, *(rule.replace(f"{name.upper()}_PASSWORD", found[name]) for rule in rules)
            )
    return found


def test_the_service_runs_with_little(database: str) -> None:
    """All processes work with a role that owns no table and separate broker users; no command is refused."""
    migrate(url_as(database, "followups_owner"))
    owner = make_engine(url_as(database, "followups_owner"))
    with EmbeddedValkey() as valkey, Processes() as processes, redis.Redis.from_url(valkey.url()) as admin:
        passwords = users(admin)
        place = valkey.url().rpartition("@")[2]
        urls = {name: f"redis://{name}:{password}@{place}" for name, password in passwords.items()}
        settings = brisk_settings(url_as(database, "followups"), urls["worker"])
        stack = Stack(settings, World(owner), processes)
        by_user = {name: replace(stack, options={"FOLLOWUPS_BROKER_URL": url}) for name, url in urls.items()}
        by_user["beat"].beat()
        stack.sandbox()
        stack.worker()
        _, url = web.start(processes, by_user["web"].environment())
        api = web.Api(url, stack.world)
        created = api.create(due=web.in_days(0))
        stack.wait_until_done(within=60)
        assert stack.accepted() == [created["id"]]
        wait_until(answers(f"{url}/readyz"))
        port = free_port()
        flower = by_user["flower"].environment() | {"FLOWER_BASIC_AUTH": "me:pa55w0rd"}
        processes.spawn("flower", [*CELERY, "flower", f"--port={port}"], environment=flower)
        client = web.client_of(("127.0.0.1", port))
        client.auth = ("me", "pa55w0rd")
        wait_until(answers(f"http://127.0.0.1:{port}/healthcheck"), within=60)
        wait_until(lambda: "worker@" in client.get("/workers").text, within=30)
        assert json.loads(client.get("/api/queues/length").text)["active_queues"]
        assert client.get("/api/workers?refresh=1").status_code == 200
        ran = subprocess.run(
            [str(Path(CELERY[0]).with_name("followups")), "doctor", "--json"],
            env=os.environ | stack.environment(),
            capture_output=True,
            check=False,
        )
        assert [one for one in json.loads(ran.stdout)["checks"] if not one["ok"]] == []
        assert [entry[b"object"] for entry in admin.execute_command("ACL", "LOG")] == []
        api.client.close()
        client.close()
        stack.stop()
    owner.dispose()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE mine (n int)",
        "DROP TABLE follow_ups",
        "ALTER TABLE follow_ups ADD n int",
        "TRUNCATE chats",
        "CREATE SCHEMA s",
    ],
)
def test_the_role_of_the_service_changes_no_table(database: str, statement: str) -> None:
    """The role of the service can read and change rows, but cannot change tables."""
    migrate(url_as(database, "followups_owner"))
    with psycopg.connect(url_as(database, "followups"), autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM follow_ups").fetchone()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.encode())


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("web", ("LPUSH", "followups:deliver", "x")),
        ("web", ("BRPOP", "followups:deliver", "1")),
        ("beat", ("LPUSH", "followups:deliver", "x")),
        ("beat", ("PUBLISH", "followups:/0.celery.pidbox", "x")),
        ("flower", ("LPUSH", "followups:deliver", "x")),
        ("worker", ("FLUSHALL",)),
        ("worker", ("SET", "others", "x")),
    ],
)
def test_a_user_of_the_broker_does_its_own_work_only(broker_url: str, user: str, command: tuple[str, ...]) -> None:
    """A broker user may not send commands that its process does not need."""
    with redis.Redis.from_url(broker_url) as admin:
        name = f"test-{uuid4().hex}"
        (line,) = [one for one in (DEPLOY / "users.acl").read_text().splitlines() if one.startswith(f"user {user} ")]
        admin.execute_command("ACL", "SETUSER", name, *line.split()[2:])
        assert admin.execute_command("ACL", "DRYRUN", name, "GET", "followups:dispatch") == b"OK"
        said = admin.execute_command("ACL", "DRYRUN", name, *command)
        assert b"permissions" in said
        admin.execute_command("ACL", "DELUSER", name)
