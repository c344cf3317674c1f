"""The compose file is valid, complete and hardened, and runs the Procfile's commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.manifests import DEPLOY, SETTINGS, compose, procfile

SERVICES = compose()["services"]
OURS = ("migrate", "web", "worker", "beat", "flower")
COMMANDS = {
    "migrate": procfile("release"),
    "web": procfile("web"),
    "worker": procfile("worker"),
    "beat": procfile("beat"),
    # In a container, a process must listen beyond the loopback interface. Access is limited by the ports that the
    # container publishes.
    "flower": [word.replace("127.0.0.1", "0.0.0.0") for word in procfile("flower")],  # noqa: S104
}


def test_the_file_is_valid() -> None:
    """The compose file conforms to the schema of the Compose specification."""
    check = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    ran = subprocess.run([*check, DEPLOY / "compose.yaml"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    """Docker Compose accepts the file. The test runs if Compose is installed, and needs no container engine."""
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    environment = tmp_path / "env"
    names = re.findall(r"^(\w+)=", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE)
    environment.write_text("".join(f"{name}=8000\n" for name in names))
    command = [docker, "compose", "--env-file", str(environment), "-f", str(DEPLOY / "compose.yaml"), "config", "-q"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", OURS)
def test_each_service_runs_the_procfiles_command(name: str) -> None:
    """Each service runs exactly the Procfile's command."""
    assert SERVICES[name]["command"] == COMMANDS[name]


@pytest.mark.parametrize("name", OURS)
def test_containers_have_few_privileges(name: str) -> None:
    """Containers have a read-only root, no capabilities, no new privileges, and a signal-forwarding init."""
    service: dict[str, Any] = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["init"] is True
    assert service["healthcheck"]
    assert service["environment"].keys() <= SETTINGS | ({"FLOWER_BASIC_AUTH"} if name == "flower" else set())


def test_the_example_has_every_variable() -> None:
    """compose.env.example lists every variable without a default, and no unused ones."""
    text = (DEPLOY / "compose.yaml").read_text()
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    shown = set(re.findall(r"^(\w+)=", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE))
    with_default = set(re.findall(r"\$\{(\w+):-", text))
    assert shown <= asked
    assert asked - with_default <= shown


def test_flower_is_published_on_loopback_only() -> None:
    """Flower, which can stop workers, is published only on the loopback interface.

    By default, `web` is published only on the loopback interface.
    """
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["flower"]["ports"])
    assert SERVICES["web"]["ports"] == ["${WEB_BIND:-127.0.0.1:8000}:8000"]


def test_every_process_waits_for_the_migration() -> None:
    """Every process waits for the migration, which waits for PostgreSQL.

    The servers' ports are not published.
    """
    for name in OURS[1:]:
        assert SERVICES[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert SERVICES["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert "ports" not in SERVICES["postgres"]
    assert "ports" not in SERVICES["valkey"]
    assert "noeviction" in " ".join(SERVICES["valkey"]["command"])


def test_a_worker_has_time_to_drain() -> None:
    """The stop timeout leaves a worker enough time for a call (10 s by default) and for settling."""
    assert int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) >= 10 + 20
