"""The package, built and installed as somebody else would, once for each process of the run that wants it."""

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

from deploy.manifests import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Built:
    """A wheel, an sdist, and an environment into which the wheel was installed."""

    directory: Path
    wheel: Path
    sdist: Path
    followups: Path


@pytest.fixture(scope="session")
def built() -> Iterator[Built]:
    """Build sdist, and wheel from it, and install the wheel with the versions that are installed here."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if not uv:
        pytest.skip("uv is not installed")
    # Not below pytest's own directory, which every session closes to others: for root, PostgreSQL is another user.
    with tempfile.TemporaryDirectory() as directory:
        yield build(uv, Path(directory))


def build(uv: str, directory: Path) -> Built:
    """Build and install into a directory."""
    call(uv, "build", "--quiet", "--out-dir", str(directory / "dist"), str(ROOT))
    (wheel,), (sdist,) = directory.glob("dist/*.whl"), directory.glob("dist/*.tar.gz")
    constraints = directory / "constraints.txt"
    pins = sorted(f"{one.metadata['Name']}=={one.version}\n" for one in distributions())
    constraints.write_text("".join(pin for pin in pins if not pin.startswith("chat-followups")))
    call(uv, "venv", "--quiet", "--python", sys.executable, str(directory / "venv"))
    python = directory / "venv" / "bin" / "python"
    call(uv, "pip", "install", "--quiet", "--python", str(python), "--constraint", str(constraints), str(wheel))
    return Built(directory, wheel, sdist, python.with_name("followups"))


def call(*command: str) -> None:
    """Run a command away from this repository's own project; show what it said when it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
