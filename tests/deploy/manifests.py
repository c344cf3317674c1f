"""Parsers for the files in deploy/ and their commands."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from followups.embedded.processes import COMMANDS
from followups.settings import Settings, environment_name

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = DEPLOY / "systemd"
KUBERNETES = DEPLOY / "kubernetes"
PREFIX = "/opt/followups/bin/"
"""Directory of the commands in the systemd units and in the image."""

SETTINGS = {environment_name(name) for name in Settings.model_fields}


def documents(path: Path) -> list[Any]:
    """Return the YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def compose() -> Any:
    """Return the parsed compose file."""
    (document,) = documents(DEPLOY / "compose.yaml")
    return document


def kubernetes() -> Iterator[tuple[str, Any]]:
    """Return each Kubernetes object with the name of its file."""
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in documents(path):
            if document["kind"] != "Kustomization":
                yield path.name, document


def unit(name: str) -> dict[str, list[str]]:
    """Return a unit's assignments by name, in systemd's reading order, with drop-ins last."""
    found: dict[str, list[str]] = {}
    files = [UNITS / name]
    if name.endswith(".service"):
        files.append(UNITS / "followups-.service.d" / "common.conf")
    for path in files:
        for line in path.read_text().splitlines():
            if "=" in line and not line.startswith(("#", "[")):
                key, _, value = line.partition("=")
                found.setdefault(key, []).append(value)
    return found


def procfile(process: str, **variables: str) -> list[str]:
    """Return a Procfile line as words; its variables get the given values, or else their defaults."""

    def value(found: re.Match[str]) -> str:
        return variables.get(found[1], found[2])

    return shlex.split(re.sub(r"\$\{(\w+):-([^}]*)\}", value, COMMANDS[process]))


def pyproject() -> dict[str, Any]:
    """Return the parsed pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
