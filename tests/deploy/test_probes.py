"""Tests of the probes: each runs an existing command, which checks only its own process."""

from __future__ import annotations

import json
import re

import pytest

from deploy.manifests import DEPLOY, compose, kubernetes
from followups.cli import main
from followups.cli.entry import CATALOGUE

PROCESSES = ("web", "worker", "beat")


def probes() -> dict[str, list[str]]:
    """Return the command of each probe, keyed by its source and its process, as in ``compose web``."""
    found = {}
    for name, service in compose()["services"].items():
        if name in PROCESSES:
            found[f"compose {name}"] = service["healthcheck"]["test"][1:]
    for file, document in kubernetes():
        if document["kind"] == "Deployment":
            for container in document["spec"]["template"]["spec"]["containers"]:
                for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                    if command := container.get(kind, {}).get("exec", {}).get("command"):
                        found[f"{file} {kind} {container['name']}"] = command
    (image,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    return found | {"image web": json.loads(image)}


@pytest.mark.parametrize(("place", "command"), probes().items(), ids=probes())
def test_each_probe_checks_its_own_process(place: str, command: list[str]) -> None:
    """Each probe runs `followups health` for its own process."""
    assert command == ["followups", "health", place.rpartition(" ")[2]]


@pytest.mark.parametrize("process", PROCESSES)
def test_the_command_exists(process: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each probe's command is a valid command of `followups`."""
    if "health" not in CATALOGUE:
        pytest.skip("this version has no `followups health`")
    assert main(["health", process, "--help"]) == 0
    assert capsys.readouterr().out
