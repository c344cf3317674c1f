"""Tests for untrusted text: commands print text from other systems as plain text on any terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from followups.telemetry.escaping import escape

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from world import World

    RunCommand = Callable[..., Any]

NASTY = "see [/b] [link=x]\x1b]8;;http://evil\x07 \x9b31m \u202eleft\nnext :smile: é €"
HOUR = timedelta(hours=1)
FAILED = {"status": "failed", "reason": NASTY, "finished_at": datetime.now(UTC)}


@pytest.fixture
def follow_up(world: World) -> UUID:
    """Put hostile text into every column that other systems can write; return the failed follow-up's id.

    The text is written directly to the database, without validation.
    """
    chat = world.chat(external_id=NASTY)
    failed = world.follow_up(chat, -HOUR, message=NASTY, **FAILED)
    pending = world.follow_up(chat, HOUR)
    world.put_in_flight(pending)
    world.sql("UPDATE follow_ups SET cancel_requested = :nasty WHERE id = :id", nasty=NASTY, id=pending)
    world.sql(
        "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail) VALUES (:id, 1, :nasty, :nasty)",
        id=failed,
        nasty=NASTY,
    )
    for statement in (
        "UPDATE workspaces SET name = :nasty",
        "INSERT INTO api_keys (workspace_id, name, prefix, key_hash) VALUES (:w, :nasty, :nasty, '')",
        "INSERT INTO pauses (workspace_id, channel) VALUES (:w, :nasty)",
        "INSERT INTO rate_limits (workspace_id, channel, per, rate, burst) VALUES (:w, :nasty, 'all', 1, 1)",
        "INSERT INTO sending_hours VALUES (:w, :nasty, '08:00', '20:00', 127, now(), now())",
        """INSERT INTO audit_events (way, actor, workspace_id, workspace, action, target_id)
           VALUES ('console', :nasty, :w, :nasty, :nasty, :id)""",
        "UPDATE audit_events SET details = jsonb_build_object(CAST(:nasty AS text), CAST(:nasty AS text))",
    ):
        with world.engine.begin() as connection:
            connection.execute(text(statement), {"w": world.workspace_id, "nasty": NASTY, "id": failed})
    return failed


COMMANDS = (
    "list", "show {id}", "show {id} --message", "audit", "audit --follow-up {id}", "api-key list", "workspace list",
    "pause --list", "limit list", "stats", "doctor", "retry {id}", "cancel {id}",
)  # fmt: skip


def test_every_command_escapes_untrusted_text(run: RunCommand, follow_up: UUID) -> None:
    """Every command accepts untrusted text but prints none of its control characters, even in JSON."""
    for command in COMMANDS:
        for form in ([], ["--json"]):
            ran = run(*command.format(id=follow_up).split(), *form)
            for written in (ran.stdout, ran.stderr):
                assert escape(written, lines=True) == written, command
            assert ran.code == 0 or command in {"doctor", "retry {id}", "cancel {id}"}, (command, ran.stderr)


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_that_is_not_utf_8(
    environment: pytest.MonkeyPatch, follow_up: UUID, variables: dict[str, str]
) -> None:
    """Characters that the terminal's encoding lacks are printed as escapes."""
    del environment
    for command in ("list", "show {id} --json"):
        ran = subprocess.run(
            [sys.executable, "-m", "followups.cli", *command.format(id=follow_up).split()],
            env=os.environ | variables,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.isascii() or "PYTHONUTF8" in variables
