"""Tests of the container image's recipe that do not build the image."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from deploy.manifests import DEPLOY, ROOT

RECIPE = (DEPLOY / "Containerfile").read_text()
STAGES = re.split(r"^FROM .*$", RECIPE, flags=re.MULTILINE)[1:]


def test_hadolint_finds_nothing() -> None:
    """Hadolint reports no problem in the Containerfile."""
    hadolint = Path(sys.executable).with_name("hadolint")
    ran = subprocess.run([hadolint, DEPLOY / "Containerfile"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_the_last_stage_contains_no_build_tools() -> None:
    """The last stage of the image contains no compiler, build-time pip or sources."""
    assert len(STAGES) == 2
    copied = re.findall(r"^COPY (.*)$", STAGES[-1], re.MULTILINE)
    assert copied == ["--from=build /opt/followups /opt/followups"]
    assert "RUN" not in STAGES[-1]


def test_the_user_is_not_root() -> None:
    """The user is a numeric id other than 0, so that Kubernetes can verify `runAsNonRoot`."""
    (user,) = re.findall(r"^USER (\d+):(\d+)$", RECIPE, re.MULTILINE)
    assert all(int(number) >= 1000 for number in user)


def test_each_installed_package_has_a_hash() -> None:
    """Every pip install either checks hashes or installs only the locally built wheel."""
    installs = re.findall(r"\binstall\b(?:[^&\n\\]|\\\n)*", RECIPE)
    assert len(installs) == 3
    for install in installs:
        assert "--require-hashes" in install or ("--no-deps" in install and "wheels/*.whl" in install)


def test_dockerignore_allows_exactly_the_copied_files() -> None:
    """Every file that the recipe copies exists, and .dockerignore allows exactly these files."""
    ignored, *let_through = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith(("#", "**"))
    ]
    assert ignored == "*"
    wanted = {word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", RECIPE, re.MULTILINE) for word in line.split()}
    assert {f"!{name}" for name in wanted} == set(let_through)
    assert all((ROOT / name).exists() for name in wanted)
