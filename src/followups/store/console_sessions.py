"""Console sessions, and sign-in links that work once. The database stores only hashes of session and link tokens."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.errors import InvalidRequestError
from followups.statements import Rule, Statement

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.statements import Steps

IDLE = timedelta(hours=8)
"""Time without use after which a console session ends."""

LIFETIME = timedelta(hours=24)
"""Age at which a console session ends even if it is in use."""

SHORTEST_LINK, LONGEST_LINK = timedelta(seconds=10), timedelta(days=7)
LINK = timedelta(hours=1)
"""Default lifetime of a sign-in link."""

PREFIX = "fcl_"
"""Prefix of a sign-in link's token; people and secret scanners recognise it."""

TOKEN = re.compile(rf"{PREFIX}[\w-]{{43}}", re.ASCII)

ROLES = ("viewer", "agent", "admin", "operator")

LONGEST_NAME = 200
PRUNED = 100
"""Maximum number of old sessions and links that one console sign-in deletes."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The rights of a console session, and the name of its user."""

    role: str
    workspace_id: UUID | None
    """The workspace that the console session may see, or None for all workspaces."""
    name: str
    chat_id: UUID | None = None
    api_key_id: UUID | None = None

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters of the SQL statement."""
        return {
            "role": self.role,
            "workspace_id": self.workspace_id,
            "name": self.name[:LONGEST_NAME],
            "chat_id": self.chat_id,
            "api_key_id": self.api_key_id,
        }


@dataclass(frozen=True, slots=True)
class ValidSession:
    """A valid console session."""

    id: UUID
    role: str
    workspace_id: UUID | None
    workspace: str | None
    chat_id: UUID | None
    way: str
    name: str
    stale: bool
    """Whether it is time to record the session's use again."""


_INSERT = text("""
    INSERT INTO console_sessions (token_hash, role, workspace_id, chat_id, way, name, api_key_id, expires_at)
    VALUES (:token_hash, :role, :workspace_id, :chat_id, :way, :name, :api_key_id, now() + :lifetime)
    RETURNING id
""")
_PRUNE = text("""
    DELETE FROM console_sessions
     WHERE id IN (SELECT id FROM console_sessions WHERE expires_at < now() - interval '7 days'
                   ORDER BY expires_at LIMIT :most FOR UPDATE SKIP LOCKED)
""")
_PRUNE_LINKS = text("""
    DELETE FROM console_links
     WHERE token_hash IN (SELECT token_hash FROM console_links WHERE expires_at < now() - interval '7 days'
                           ORDER BY expires_at LIMIT :most FOR UPDATE SKIP LOCKED)
""")


def begin(session: Session, grant: Grant, way: str) -> str:
    """Create a console session and return its token, which is not stored."""
    token = secrets.token_urlsafe(32)
    values = {"token_hash": hash_of(token), "way": way, "lifetime": LIFETIME}
    session.execute(_INSERT, grant.parameters | values)
    session.execute(_PRUNE, {"most": PRUNED})
    session.execute(_PRUNE_LINKS, {"most": PRUNED})
    return token


_VALID = """
       s.ended_at IS NULL AND s.expires_at > now() AND s.seen_at > now() - CAST(:idle AS interval)
       AND (s.api_key_id IS NULL OR EXISTS (
            SELECT FROM api_keys k WHERE k.id = s.api_key_id AND k.revoked_at IS NULL
                                     AND (k.expires_at IS NULL OR k.expires_at > now())))
"""
_FIND = text(f"""
    SELECT s.id, s.role, s.workspace_id, w.name AS workspace, s.chat_id, s.way, s.name,
           s.seen_at < now() - interval '1 minute' AS stale
      FROM console_sessions s LEFT JOIN workspaces w ON w.id = s.workspace_id
     WHERE s.token_hash = :token_hash AND {_VALID}
""")  # noqa: S608 - no input, only the constant above
_SEEN = text("UPDATE console_sessions SET seen_at = now() WHERE id = :id AND ended_at IS NULL")


def find(session: Session, token: str) -> ValidSession | None:
    """Return the valid console session with this token, or None."""
    row = session.execute(_FIND, {"token_hash": hash_of(token), "idle": IDLE}).one_or_none()
    return ValidSession(*row) if row else None


def record_use(session: Session, session_id: UUID) -> None:
    """Record that the console session is in use, so that it does not time out."""
    session.execute(_SEEN, {"id": session_id})


_END = text("UPDATE console_sessions SET ended_at = now() WHERE token_hash = :token_hash AND ended_at IS NULL")
_END_BY_ID = text("""
    UPDATE console_sessions SET ended_at = now()
     WHERE id = :id AND ended_at IS NULL
       AND (CAST(:workspace_id AS uuid) IS NULL OR workspace_id = CAST(:workspace_id AS uuid))
""")


def end(session: Session, token: str) -> None:
    """End the console session with this token."""
    session.execute(_END, {"token_hash": hash_of(token)})


def end_one(session: Session, session_id: UUID, workspace_id: UUID | None) -> bool:
    """End a console session and return whether one was ended.

    With ``workspace_id``, only a session of that workspace is ended.
    """
    result = session.execute(_END_BY_ID, {"id": session_id, "workspace_id": workspace_id})
    return bool(result.rowcount)  # type: ignore[attr-defined] # an UPDATE's result has it


@dataclass(frozen=True, slots=True)
class ListedSession:
    """A console session with the details that the settings page shows."""

    id: UUID
    name: str
    way: str
    role: str
    created_at: datetime
    seen_at: datetime


_LIST = text(f"""
    SELECT s.id, s.name, s.way, s.role, s.created_at, s.seen_at FROM console_sessions s
     WHERE s.workspace_id IS NOT DISTINCT FROM CAST(:workspace_id AS uuid) AND {_VALID}
     ORDER BY s.created_at DESC LIMIT :most
""")  # noqa: S608 - no input, only the constant above


def of_workspace(session: Session, workspace_id: UUID | None, most: int) -> list[ListedSession]:
    """Return the newest valid console sessions of a workspace, or of all workspaces if the id is None."""
    rows = session.execute(_LIST, {"workspace_id": workspace_id, "idle": IDLE, "most": most})
    return [ListedSession(*row) for row in rows]


_INSERT_LINK = Statement("""
    INSERT INTO console_links (token_hash, role, workspace_id, chat_id, name, api_key_id, expires_at)
    VALUES (:token_hash, :role, :workspace_id, :chat_id, :name, :api_key_id, now() + CAST(:lifetime AS interval))
    RETURNING expires_at
""")
_USE_LINK = text("""
    UPDATE console_links SET used_at = now()
     WHERE token_hash = :token_hash AND used_at IS NULL AND expires_at > now()
       AND (api_key_id IS NULL OR EXISTS (
            SELECT FROM api_keys k WHERE k.id = console_links.api_key_id AND k.revoked_at IS NULL
                                     AND (k.expires_at IS NULL OR k.expires_at > now())))
    RETURNING role, workspace_id, name, chat_id, api_key_id
""")


@Rule
def make_link(grant: Grant, lifetime: timedelta) -> Steps[tuple[str, datetime]]:
    """Create a sign-in link; return its token, which is not stored, and its time of expiry.

    Raises `InvalidRequestError` if the lifetime is out of range.
    """
    if not SHORTEST_LINK <= lifetime <= LONGEST_LINK:
        message = "A link can be used for 10 seconds to 7 days."
        raise InvalidRequestError(message, field="expires_in")
    token = PREFIX + secrets.token_urlsafe(32)
    (row,) = yield _INSERT_LINK(**grant.parameters, token_hash=hash_of(token), lifetime=lifetime)
    return token, row.expires_at


def use_link(session: Session, token: str) -> Grant | None:
    """Use up a sign-in link; return the rights it grants, or None if it is unknown, expired or used."""
    if not TOKEN.fullmatch(token):
        return None
    row = session.execute(_USE_LINK, {"token_hash": hash_of(token)}).one_or_none()
    return Grant(*row) if row else None


def hash_of(token: str) -> bytes:
    """Return the stored hash of a token.

    A token needs no slow hash, because its 256 random bits cannot be guessed.
    """
    return sha256(token.encode(errors="replace")).digest()
