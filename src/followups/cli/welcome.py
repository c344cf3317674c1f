"""What ``followups up`` prints when it is ready. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SHOWN = ("FOLLOWUPS_DATABASE_URL", "FOLLOWUPS_BROKER_URL", "FOLLOWUPS_TRANSPORT_URL")
"""Settings that other commands need to reach this system."""

IN_FIVE_SECONDS = "$(date -u -d '+5 seconds' +%FT%TZ 2>/dev/null || date -u -v+5S +%FT%TZ)"
"""Shell for a time five seconds after it is pasted, in RFC 3339: by GNU date, else by the date of BSD and macOS."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses to print."""

    api: str
    sandbox: str
    logs: Path
    data: Path | None
    environment: Mapping[str, str]


def welcome(where: Addresses, key: str) -> str:
    """Return the text: addresses, the key, a request to paste, and other commands to try."""
    exports = "\n".join(f"export {name}='{where.environment[name]}'" for name in SHOWN)
    return f"""
Ready.

  REST API       {where.api}/api/v1/
  Documentation  {where.api}/docs
  Sandbox chat   {where.sandbox}/  (watch the messages arrive there)
  API key        {key}
  Logs           {where.logs}
  Data           {where.data or "temporary; --data DIR keeps it"}

An agent writes in a chat, and a follow-up is due five seconds later. Paste this:

{request(where.api, key, uuid4(), uuid4())}

followups stats --watch, list, show and the others look at it from another terminal, after

{exports}

Ctrl-C stops it all.
"""


def request(api: str, key: str, chat_id: UUID, message_id: UUID) -> str:
    """Return shell commands that record an agent's message and schedule a follow-up after it."""
    headers = f"-H 'authorization: Bearer {key}' -H 'content-type: application/json'"
    return f"""\
curl -sS {api}/api/v1/chat-messages \\
  {headers} \\
  -d '{{"id": "{message_id}", "chatId": "{chat_id}", "role": "agent"}}'
curl -sS {api}/api/v1/chat-message-follow-ups \\
  {headers} \\
  -d '{{"chatId": "{chat_id}", "message": "Hello! Are you still there?",
       "dueDate": "'"{IN_FIVE_SECONDS}"'"}}'"""
