"""How a command ends: its exit codes, and its output for help and errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer
from sqlalchemy.exc import OperationalError, ProgrammingError

from followups.cli import main
from followups.cli.entry import CATALOGUE, load
from followups.cli.failures import explain
from followups.errors import (
    AlreadyFinishedError,
    DeliveryInProgressError,
    FollowUpNotFoundError,
    FollowUpsError,
    InvalidRequestError,
    OutsideMessagingWindowError,
    SettingsError,
)

GROUPS = {
    "workspace": ("create", "list", "hours", "delete"),
    "chat": ("delete",),
    "api-key": ("create", "list", "revoke"),
    "health": ("worker", "beat", "web"),
    "limit": ("set", "clear", "list"),
}
PATHS = [[name] for name in CATALOGUE] + [[group, name] for group, names in GROUPS.items() for name in names]


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_help_text_ends_with_examples(path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command's help goes to stdout, with exit code 0 and examples at the end."""
    assert main([*path, "--help"]) == 0
    shown, remarks = capsys.readouterr()
    assert f"Usage: followups {' '.join(path)}" in shown
    assert f"$ followups {path[0]}" in shown or "$(followups" in shown
    assert not remarks


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_listed_command_can_be_loaded(name: str) -> None:
    """Every command in the catalogue can be loaded and has its listed name."""
    assert load(name).name in {name, None, ""}  # a command group has the name under which it is registered


def test_the_help_lists_every_command_and_loads_none(capsys: pytest.CaptureFixture[str]) -> None:
    """The top-level help lists every command without importing slow modules."""
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"│ {name} " in shown for name in CATALOGUE)
    script = """
import sys
import followups
before = set(sys.modules)
from followups.cli import main
main(["--help"])
heavy = ("sqlalchemy", "alembic", "celery", "kombu", "redis", "fastapi", "aiohttp", "pydantic", "followups.store")
print([name for name in sys.modules.keys() - before if name.startswith(heavy)], file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr == "[]\n"


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command, `followups` prints its help on stderr and exits with code 2."""
    assert main([]) == 2
    shown, remarks = capsys.readouterr()
    assert not shown
    assert "Usage: followups" in remarks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lst"], "followups: No such command 'lst'. Did you mean 'list'?; see followups --help.\n"),
        (["list", "--foo"], "followups: No such option: --foo; see followups list --help.\n"),
        (["list", "--limit", "0"], "0 is not in the range 1<=x<=1000; see followups list --help.\n"),
        (["list", "--status", "gone"], "see followups list --help.\n"),
        (["show"], "followups: Missing argument 'ID'; see followups show --help.\n"),
        (["show", "1"], "followups: Invalid value for 'ID': '1' is not a valid UUID; see followups show --help.\n"),
        (["reschedule", "0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51", "--due", "2030-01-31"], "must carry an offset"),
        (["workspace"], "followups: Missing command; see followups workspace --help.\n"),
        (["api-key", "create"], "followups: Missing option '--workspace'; see followups api-key create --help.\n"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A usage error prints one line with the cause on stderr, and exits with code 2.

    Nothing is printed on stdout.
    """
    assert main(arguments) == 2
    shown, remarks = capsys.readouterr()
    assert not shown
    assert said in remarks
    assert remarks.count("\n") == 1


def test_missing_settings_are_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """If settings are missing, a command names each missing setting and exits with code 2."""
    assert main(["list"]) == 2
    remarks = capsys.readouterr().err
    assert "FOLLOWUPS_DATABASE_URL is required" in remarks
    assert "FOLLOWUPS_BROKER_URL is required" in remarks


def test_the_version_is_printed_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the version on stdout."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("followups 0.")


def test_debug_prints_the_traceback() -> None:
    """With --debug, a command prints an error with its traceback."""
    with pytest.raises(SettingsError):
        main(["--debug", "list"])


class RefusedError(Exception):
    """A stand-in for a database driver's error."""

    sqlstate = "42P01"


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (SettingsError("X is wrong."), "X is wrong.", 2),
        (InvalidRequestError("Too long."), "Too long.", 2),
        (OutsideMessagingWindowError(), "The due date is outside the channel's messaging window; the user must", 1),
        (FollowUpNotFoundError(), "The follow-up was not found; followups list shows the existing ones.", 2),
        (AlreadyFinishedError(), "The follow-up has already finished", 1),
        (DeliveryInProgressError(), "The follow-up is being delivered at this moment; try again shortly.", 1),
        (FollowUpsError(), "The follow-up dispatcher could not carry out the request.", 1),
        (typer.Abort(), "Interrupted before completion.", 1),
        (PermissionError(13, "Permission denied", "/data"), "/data: Permission denied; choose another path", 1),
        (ValueError("odd\nmore"), "An unexpected error occurred (ValueError: odd); followups --debug", 1),
        (
            OperationalError("SELECT secret", {}, Exception('at "h", port 1 failed: Connection refused\n\tReally?')),
            "The database 'chats' at db:1 cannot be reached: connection refused; start it, or correct",
            1,
        ),
        (
            ProgrammingError("SELECT secret", {}, RefusedError("no such table")),
            "The database 'chats' at db:1 does not have the newest schema; run followups migrate.",
            1,
        ),
        (
            ProgrammingError("SELECT secret", {}, Exception("Denied.")),
            "The database 'chats' at db:1 refused a statement: denied.",
            1,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_is_a_sentence(error: Exception, sentence: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every error has an exit code, and its message is a sentence without traceback, SQL or password."""
    monkeypatch.setenv("FOLLOWUPS_DATABASE_URL", "postgresql://me:hidden@db:1/chats")
    monkeypatch.setenv("FOLLOWUPS_BROKER_URL", "redis://b")
    said, found = explain(error)
    assert said.startswith(sentence)
    assert found == code
    assert "\n" not in said
    assert "hidden" not in said
    assert "SELECT" not in said


def test_a_closed_pipe_is_no_error() -> None:
    """If the reader of a command's output closes the pipe, the command ends silently."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "followups.cli", "--help"]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (1, "")
