"""An installation as in OPERATIONS.md, with Debian's PostgreSQL and Redis, TLS, roles and secret files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import redis
import trustme

import web
from databases import OWNER, SERVICE, make_roles
from deploy.manifests import DEPLOY
from faults import replica
from followups.embedded import Processes, answers, free_port
from followups.urls import broker_url
from redis_server import MISSING, PROGRAM, RedisServer
from secure_postgres import SecureServer
from stack import CELERY, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = [
    pytest.mark.skipif(replica.INSTALLED is None, reason=replica.MISSING),
    pytest.mark.skipif(PROGRAM is None, reason=MISSING),
]

COMMAND = Path(sys.executable).with_name("followups")
USERS = ("worker", "web", "beat", "flower")
ODD = "s3cret/with?odd#characters"
PASSWORDS = {name: f"{ODD}-{name}" for name in (*USERS, OWNER, SERVICE)} | {"tests": ODD}
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105 - of a server that lives as long as this test


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return the URLs of servers that accept only TLS, by database role and broker user."""
    assert replica.INSTALLED
    authority = trustme.CA()
    trusted = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(trusted)
    users = (DEPLOY / "users.acl").read_text()
    for name in USERS:
        users = users.replace(f"{name.upper()}_PASSWORD", PASSWORDS[name])
    users += f"user tests on >{ODD} +acl\n"
    with SecureServer(replica.INSTALLED, authority) as postgres, RedisServer(authority, users=users) as broker:
        given = {"OWNER_PASSWORD": PASSWORDS[OWNER], "SERVICE_PASSWORD": PASSWORDS[SERVICE]}
        make_roles(postgres.url(), passwords=given)
        query = f"sslmode=verify-full&sslrootcert={trusted}"
        roles = {
            role: postgres.secure_url("localhost", query, f"{role}:{PASSWORDS[role]}", SERVICE)
            for role in (OWNER, SERVICE)
        }
        yield roles | {name: broker.url(user=name, password=PASSWORDS[name]) for name in (*USERS, "tests")}


def secret_files(directory: Path, **secrets: str) -> dict[str, str]:
    """Write each secret into a separate file, and return the settings that name the files."""
    directory.mkdir()
    for name, secret in secrets.items():
        (directory / name).write_text(f"{secret}\n")
        (directory / name).chmod(0o600)
    return {f"FOLLOWUPS_{name}_FILE": str(directory / name) for name in secrets}


def followups(environment: Mapping[str, str], *arguments: str) -> str:
    """Run a command, and return its output."""
    ran = subprocess.run([COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.strip()


def test_an_installation_with_tls_and_broker_users_delivers(servers: dict[str, str], tmp_path: Path) -> None:
    """If each process has its own certificate, role, user and secret file, a follow-up is sent.

    Doctor has no findings, and the broker refuses no command. The delivery is signed, and no log contains a secret.
    """
    usual = {
        "PATH": os.environ["PATH"],
        "FOLLOWUPS_RUNTIME_DIR": str(tmp_path / "signs"),
        "FOLLOWUPS_LOG_FORMAT": "json",
    }
    usual["FOLLOWUPS_TRANSPORT_URL"] = f"http://127.0.0.1:{(chat := free_port())}/messages"
    of = {
        name: usual | secret_files(tmp_path / name, DATABASE_URL=servers[SERVICE], BROKER_URL=servers[name])
        for name in ("worker", "web", "flower")
    }
    of["worker"] |= secret_files(tmp_path / "signing", TRANSPORT_SECRET=SECRET)
    of["beat"] = usual | secret_files(tmp_path / "beat", BROKER_URL=servers["beat"])
    # the beat process never connects to the database
    of["beat"]["FOLLOWUPS_DATABASE_URL"] = "postgresql://localhost/followups"
    of["owner"] = usual | secret_files(tmp_path / "owner", DATABASE_URL=servers[OWNER], BROKER_URL=servers["web"])
    assert "it was empty" in followups(of["owner"], "migrate")
    followups(of["web"], "workspace", "create", "acme")
    key = followups(of["web"], "api-key", "create", "--workspace", "acme")
    with Processes() as processes:
        processes.spawn("beat", [*CELERY, "beat", "--loglevel=info"], environment=of["beat"])
        processes.spawn("worker", [*CELERY, "worker", "--hostname=worker@%h"], environment=of["worker"])
        sandbox = [sys.executable, "-m", "followups.transports.sandbox.server", "--port", str(chat)]
        processes.spawn("sandbox", sandbox, environment={"FOLLOWUPS_TRANSPORT_SECRET": SECRET})
        _, url = web.start(processes, of["web"])
        flower = f"http://127.0.0.1:{(port := free_port())}"
        own = {"FLOWER_BASIC_AUTH": "me:pa55w0rd", "FLOWER_PORT": str(port)}
        processes.spawn("flower", [*CELERY, "flower"], environment=of["flower"] | own)

        wait_until(answers(f"{url}/readyz"), within=60)
        with web.client_of(("127.0.0.1", int(url.rpartition(":")[2])), key) as client:
            chat_id = str(uuid4())
            assert client.put(f"{web.CHATS}/{chat_id}", json={"channel": "api"}).status_code == 201
            said = {"id": str(uuid4()), "chatId": chat_id, "role": "agent"}
            assert client.post(web.CHAT_MESSAGES, json=said).status_code == 201
            body = {"chatId": chat_id, "dueDate": web.in_days(0), "message": "Still there?"}
            created = client.post(web.FOLLOW_UPS, json=body).json()
            place = f"{web.FOLLOW_UPS}/{created['id']}"
            wait_until(lambda: client.get(place).json()["status"] == "sent", within=30)
        wait_until(answers(f"{flower}/healthcheck"), within=60)
        with web.client_of(("127.0.0.1", port)) as client:
            client.auth = ("me", "pa55w0rd")
            wait_until(lambda: "worker@" in client.get("/workers").text, within=30)
            assert client.get("/api/queues/length").json()["active_queues"]
            assert client.get("/api/workers?refresh=1").status_code == 200

        found = json.loads(followups(of["worker"], "doctor", "--json"))["checks"]
        assert [one for one in found if not one["ok"]] == []
        secure = [one["detail"] for one in found if "verified" in one["detail"]]
        assert secure == ["TLSv1.3, certificate and host name verified"] * 2
        with redis.Redis.from_url(broker_url(servers["tests"])) as broker:
            assert broker.execute_command("ACL", "LOG") == []
        logs = "".join(path.read_text() for path in processes.logs.glob("*.log"))
        assert [name for name, secret in {**PASSWORDS, "key": key, "secret": SECRET}.items() if secret in logs] == []
        assert ODD not in logs
