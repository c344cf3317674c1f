"""The output of `up`: addresses, the API key, and commands to paste into a shell."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from followups.cli.up import SHOWN, Addresses, request, welcome

KEY = "fup_a-key"

BASH = shutil.which("bash") or ""
CURL_INSTEAD = 'curl() { printf "%s\\n" "${@: -1}"; }\n'
"""A shell function that replaces curl and prints its last argument, the request body."""


@pytest.mark.skipif(not BASH, reason="needs bash")
def test_the_request_can_be_pasted() -> None:
    """The commands that `up` prints can be pasted into a shell.

    The follow-up that they schedule is due in five seconds.
    """
    chat_id, message_id = uuid4(), uuid4()
    script = CURL_INSTEAD + request("http://h:1", KEY, chat_id, message_id)
    ran = subprocess.run([BASH, "-c", script], capture_output=True, text=True, check=True)
    message, follow_up = (json.loads(body) for body in ran.stdout.replace("}\n{", "}\0{").split("\0"))
    assert message == {"id": str(message_id), "chatId": str(chat_id), "role": "agent"}
    assert follow_up.keys() == {"chatId", "message", "dueDate"}
    left = datetime.fromisoformat(follow_up["dueDate"]) - datetime.now(UTC)
    assert timedelta(seconds=2) < left <= timedelta(seconds=5)


def test_addresses_key_and_settings_are_printed() -> None:
    """The output of `up` contains every address, the API key, and settings for other commands."""
    environment = {name: f"{name.lower()}-value" for name in SHOWN}
    said = welcome(
        Addresses("http://h:1", "http://h:1/console/login#token=t", "http://h:2", Path("/logs"), None, environment), KEY
    )
    for words in (
        "http://h:1/docs",
        "http://h:1/console/login#token=t",
        "http://h:2/",
        f"API key        {KEY}",
        "/logs",
        "temporary",
        "Ctrl-C",
    ):
        assert words in said
    for name, value in environment.items():
        assert f"\nexport {name}='{value}'\n" in said
