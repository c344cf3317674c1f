"""The Procfile, and the commands that `up` and `demo` share with it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from honcho.environ import parse_procfile

from followups.embedded.processes import COMMANDS, argv, search_path

if TYPE_CHECKING:
    import pytest

PROCFILE = Path(__file__).parents[3] / "Procfile"


def test_the_procfile_has_the_same_lines() -> None:
    """The Procfile has the same processes and command lines as `up`, in the same order."""
    assert list(parse_procfile(PROCFILE.read_text()).processes.items()) == list(COMMANDS.items())


def test_flower_listens_on_loopback() -> None:
    """Flower listens only on the loopback interface by default; any other address requires a password."""
    assert "--address=${FLOWER_ADDRESS:-127.0.0.1}" in COMMANDS["flower"]


def test_a_command_line_is_run_by_a_shell_with_more_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell expands the Procfile's line but leaves further arguments unchanged."""
    monkeypatch.setitem(COMMANDS, "probe", "printf '%s|' ${NAME:-unnamed}")
    monkeypatch.delenv("NAME", raising=False)
    ran = subprocess.run(argv("probe", "a b", "$c"), capture_output=True, text=True, check=True)
    assert ran.stdout == "unnamed|a b|$c|"


def test_the_commands_of_this_installation_come_first() -> None:
    """On the search path, this installation's commands come before others of the same name."""
    assert (Path(search_path().split(":")[0]) / "python").exists()
