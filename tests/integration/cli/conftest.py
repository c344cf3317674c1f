"""Fixtures for commands: run the command line on a test's own database."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy import make_url

from databases import SERVICE, SUPERUSER, url_as
from followups.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from followups.settings import Settings


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of running a command: exit code, stdout and stderr."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Put the test's settings into the environment and return the `monkeypatch` fixture."""
    monkeypatch.setenv("FOLLOWUPS_RUNTIME_DIR", str(tmp_path))
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def run(environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Return a function that runs a command with the test's settings."""
    del environment

    def run_command(*arguments: object) -> CommandResult:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return CommandResult(code, *capsys.readouterr())

    return run_command


@pytest.fixture
def unprivileged_url(database_url: str) -> Iterator[str]:
    """Return a database URL with a role that may not see what other roles are doing."""
    url = make_url(database_url)
    role = f"role_of_{url.database}"
    with psycopg.connect(url_as(database_url, SUPERUSER), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role}")
        connection.execute(f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {role}")
        connection.execute(f"GRANT {role} TO {SERVICE}")
        yield url.update_query_dict({"options": f"-c role={role}"}).render_as_string(hide_password=False)
        connection.execute(f"DROP OWNED BY {role}")
        connection.execute(f"DROP ROLE {role}")
