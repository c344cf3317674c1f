"""The systemd units are valid and confined, and run the Procfile's commands.

The tests need no running systemd.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from deploy.manifests import PREFIX, SETTINGS, UNITS, procfile, unit

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = {
    "followups-web.service": procfile("web"),
    "followups-worker@.service": procfile("worker", HONCHO_PROCESS_NAME="worker.%i"),
    "followups-beat.service": procfile("beat"),
    "followups-flower.service": procfile("flower"),
    "followups-migrate.service": procfile("release"),
}
LASTING = [name for name in COMMANDS if "migrate" not in name]
OLDEST_SYSTEMD = 252
MOST_EXPOSED = 20
"""The highest allowed systemd exposure score; an unconfined service has 100."""


@pytest.fixture
def analyze() -> str:
    """Return the path of `systemd-analyze`."""
    if not (found := shutil.which("systemd-analyze")):
        pytest.skip("systemd-analyze is not installed; the commands and the confinement are compared all the same")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    if int(version) < OLDEST_SYSTEMD:
        pytest.skip(f"systemd-analyze {version} cannot check units in another root")
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a root directory in which the units, their targets and their commands are installed."""
    shutil.copytree(UNITS, tmp_path / "etc/systemd/system")
    system = tmp_path / "usr/lib/systemd/system"
    system.mkdir(parents=True)
    for target in ("basic", "sysinit", "shutdown", "network-online", "multi-user"):
        (system / f"{target}.target").write_text("[Unit]\n")
    binaries = tmp_path / PREFIX.strip("/")
    binaries.mkdir(parents=True)
    for command in ("python", "celery", "followups"):
        (binaries / command).write_text("#!/bin/sh\n")
        (binaries / command).chmod(0o755)
    return tmp_path


def verify(analyze: str, root: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Run systemd's own check of a unit in a root directory."""
    command = [analyze, "verify", "--man=no", "--recursive-errors=no", f"--root={root}", name.replace("@.", "@1.")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [*COMMANDS, "followups.target"])
def test_systemd_reports_no_problem(analyze: str, installed: Path, name: str) -> None:
    """When systemd verifies the units, it accepts each one without a warning."""
    ran = verify(analyze, installed, name)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_systemd_reports_an_invalid_unit(analyze: str, installed: Path) -> None:
    """The systemd check reports a misspelled setting and a missing command."""
    unit = installed / "etc/systemd/system/followups-web.service"
    unit.write_text(unit.read_text().replace("RestartSec", "RestartSecs").replace("bin/python", "bin/pyton"))
    said = verify(analyze, installed, unit.name).stderr
    assert "RestartSecs" in said
    assert "pyton" in said


@pytest.mark.parametrize("name", LASTING)
def test_systemd_rates_the_exposure_as_low(analyze: str, installed: Path, name: str) -> None:
    """By systemd's own rating, the exposure of each service is low."""
    confined = [analyze, "security", "--offline=yes", f"--threshold={MOST_EXPOSED}", f"--root={installed}"]
    ran = subprocess.run([*confined, "--no-pager", name.replace("@.", "@1.")], capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout.decode().splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_unit_runs_the_procfiles_command(name: str) -> None:
    """Each systemd unit runs the same command as the Procfile, with the installed path."""
    (line,) = unit(name)["ExecStart"]
    command, *arguments = [word.replace("%%", "%") for word in line.split()]
    assert command.startswith(PREFIX)
    assert [command.removeprefix(PREFIX), *arguments] == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_settings_of_one_process_override_those_of_all(name: str) -> None:
    """Each unit reads its own settings file last, because systemd uses the last value."""
    process = name.removeprefix("followups-").removesuffix(".service").removesuffix("@")
    assert unit(name)["EnvironmentFile"] == ["/etc/followups/followups.env", f"-/etc/followups/{process}.env"]


@pytest.mark.parametrize("name", LASTING)
def test_each_unit_is_restricted_and_restarted(name: str) -> None:
    """Each systemd unit sets the most important restrictions and restarts its process."""
    found = unit(name)
    assert found["Type"] == ["exec"]
    assert found["Restart"] == ["always"]
    for key in ("DynamicUser", "NoNewPrivileges", "PrivateTmp", "MemoryDenyWriteExecute"):
        assert found[key] == ["yes"]
    assert found["ProtectSystem"] == ["strict"]
    assert found["CapabilityBoundingSet"] == [""]
    assert found["WantedBy"] == ["followups.target"]


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("followups-web.service", 20), ("followups-worker@.service", 30), ("followups-beat.service", 10)],
)
def test_each_unit_has_time_to_drain(name: str, seconds: int) -> None:
    """Each unit's stop timeout leaves time for requests, calls in flight or a publish to finish."""
    found = unit(name)
    assert int(found["TimeoutStopSec"][-1]) >= seconds
    assert found["KillSignal"] == ["SIGTERM"]
    assert found["KillMode"] == ["mixed"]


def test_the_example_names_settings_that_exist() -> None:
    """Every line of the example environment file names a setting or the port."""
    names = re.findall(r"^#?([A-Z_]+)=", (UNITS / "followups.env.example").read_text(), re.MULTILINE)
    assert {"FOLLOWUPS_DATABASE_URL", "FOLLOWUPS_BROKER_URL", "FOLLOWUPS_TRANSPORT_URL"} <= set(names)
    assert set(names) <= SETTINGS | {"PORT"}
