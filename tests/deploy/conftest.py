"""Fixtures: the package as users install it, and Prometheus with the real system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

import web
from deploy.manifests import DEPLOY, ROOT
from deploy.prometheus import Prometheus, shortened
from followups.embedded import answers, free_port
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stack import Stack


@dataclass(frozen=True)
class Built:
    """A wheel, an sdist, and an environment in which the wheel is installed."""

    directory: Path
    wheel: Path
    sdist: Path
    followups: Path
    bare: Path
    """The `followups` command in an environment without extras."""


@pytest.fixture(scope="session")
def built() -> Iterator[Built]:
    """Build the sdist and its wheel; install the wheel with this environment's dependencies."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if not uv:
        pytest.skip("uv is not installed")
    # Only the user who runs the tests can read pytest's own directory, so another one is used. If root runs the tests,
    # PostgreSQL runs as another user.
    with tempfile.TemporaryDirectory() as directory:
        yield build(uv, Path(directory))


def build(uv: str, directory: Path) -> Built:
    """Build the wheel and the sdist, and install the wheel with and without its extras."""
    call(uv, "build", "--quiet", "--out-dir", str(directory / "dist"), str(ROOT))
    (wheel,), (sdist,) = directory.glob("dist/*.whl"), directory.glob("dist/*.tar.gz")
    constraints = directory / "constraints.txt"
    pins = sorted(f"{one.metadata['Name']}=={one.version}\n" for one in distributions())
    constraints.write_text("".join(pin for pin in pins if not pin.startswith("chat-followups")))
    commands = []
    for name, extras in (("venv", "[embedded,flower]"), ("bare", "")):
        call(uv, "venv", "--quiet", "--python", sys.executable, str(directory / name))
        python = directory / name / "bin" / "python"
        pinned = ["--python", str(python), "--constraint", str(constraints)]
        call(uv, "pip", "install", "--quiet", *pinned, f"chat-followups{extras} @ {wheel.as_uri()}")
        commands.append(python.with_name("followups"))
    return Built(directory, wheel, sdist, *commands)


def call(*command: str) -> None:
    """Run a command outside this project's virtual environment, and show its errors if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def scraped(stack: Stack) -> str:
    """Start every process, including `web`, and return the URL of `web`."""
    stack.options |= {"FOLLOWUPS_MAX_ATTEMPTS": "2", "FOLLOWUPS_TICK_INTERVAL": "0.5"}
    stack.start()
    return web.start(stack.processes, stack.environment())[1]


@pytest.fixture
def prometheus(stack: Stack, scraped: str, tmp_path: Path) -> Prometheus:
    """Return a Prometheus that scrapes `web`, with the rules from deploy/."""
    if not (found := shutil.which("prometheus")):
        pytest.skip("prometheus is not installed")
    (tmp_path / "alerts.yaml").write_text(shortened((DEPLOY / "prometheus" / "alerts.yaml").read_text()))
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    configuration["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    configuration["scrape_configs"][0]["static_configs"][0]["targets"] = [scraped.removeprefix("http://")]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    url = f"http://127.0.0.1:{(port := free_port())}"
    arguments = [f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    command = [found, *arguments, f"--web.listen-address=127.0.0.1:{port}"]
    stack.processes.spawn("prometheus", command, ready=answers(f"{url}/-/ready"))
    wait_until(lambda: Prometheus(url).ask("followups_pending"), within=30)
    return Prometheus(url)
