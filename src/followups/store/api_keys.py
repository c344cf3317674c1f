"""API keys. A key is shown once, when it is created; the database stores its SHA-256 hash.

An API key needs no slow hash, because its 256 random bits cannot be guessed. A key ends with a checksum, so a mistyped
key is recognised without a query. Keys created before checksums were introduced have no checksum, and remain valid.
"""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from hashlib import sha256
from hmac import compare_digest
from typing import TYPE_CHECKING
from zlib import crc32

from sqlalchemy import func, select, update

from followups.errors import ApiKeyNotFoundError, InvalidRequestError
from followups.models import ApiKey, Workspace
from followups.statements import Rule, Statement
from followups.store import workspaces
from followups.store.workspaces import check_name
from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.statements import Steps

PREFIX = "fup_"
"""Prefix by which people and secret scanners recognise an API key."""

SHOWN_LENGTH = 12
"""Number of characters of an API key stored in plain text, to tell keys apart. The stored characters reveal 48 of the
key's 256 random bits.
"""

_LENGTH = len(PREFIX) + 43  # 32 bytes in URL-safe base 64, without padding
_CHECKSUM_LENGTH = 6

LONGEST_LIFE = timedelta(days=36_500)
"""The longest lifetime of an API key."""


def create(
    session: Session, workspace_id: UUID, name: str = "", expires: timedelta | None = None
) -> tuple[ApiKey, str]:
    """Create an API key for the workspace; return its row and the key, which is never shown again.

    If ``expires`` is given, the key is rejected once that time has passed. Raises `InvalidRequestError` if the lifetime
    is invalid, or if the name is too long or cannot be stored. A valid lifetime is positive and at most a hundred
    years. Raises `WorkspaceNotFoundError` if there is no such workspace or it is being deleted.
    """
    check_name(name)
    if expires is not None and not timedelta(0) < expires <= LONGEST_LIFE:
        message = Sentence("A key must expire in the future, and within {days} days.", days=f"{LONGEST_LIFE.days:,}")
        raise InvalidRequestError(message, field="expires")
    workspaces.keep(session, workspace_id)
    key = PREFIX + secrets.token_urlsafe(32)
    key += _checksum(key)
    row = ApiKey(
        workspace_id=workspace_id,
        name=name,
        prefix=key[:SHOWN_LENGTH],
        key_hash=sha256(key.encode()).digest(),
        expires_at=None if expires is None else func.now() + expires,
    )
    session.add(row)
    session.flush()
    session.refresh(row)  # the database computes the expiry time
    return row, key


def everything(session: Session) -> Sequence[tuple[ApiKey, str]]:
    """Return all API keys with the names of their workspaces, oldest first."""
    query = select(ApiKey, Workspace.name).join(Workspace, Workspace.id == ApiKey.workspace_id)
    return [(row[0], row[1]) for row in session.execute(query.order_by(ApiKey.created_at, ApiKey.id))]


def revoke(session: Session, key_id: UUID) -> ApiKey:
    """Revoke the API key; revoking it again changes nothing. Raises `ApiKeyNotFoundError`."""
    statement = (
        update(ApiKey)
        .where(ApiKey.id == key_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
        .returning(ApiKey)
    )
    row = session.scalar(statement, execution_options={"populate_existing": True})
    if row is None:
        raise ApiKeyNotFoundError
    return row


@dataclass(frozen=True, slots=True)
class Identity:
    """The ids of an API key and of its workspace, which never change."""

    key_id: UUID
    workspace_id: UUID


_VALID = "k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())"
IS_VALID = f"EXISTS (SELECT FROM api_keys k WHERE k.id = :key_id AND {_VALID})"
"""SQL condition that the API key ``key_id`` is valid, for statements that check keys themselves."""

_BY_HASH = Statement(f"SELECT id, workspace_id, key_hash FROM api_keys k WHERE key_hash = :key_hash AND {_VALID}")  # noqa: S608 - no input, only the constant above


@Rule
def authenticate(key: str) -> Steps[Identity | None]:
    """Return an API key's owner, or None if the key is malformed, unknown, expired or revoked.

    Since the key is looked up by its hash, the duration of the query reveals nothing about the key. The stored hash and
    the given key's hash are then compared in constant time.
    """
    hashed = hash_of(key)
    if hashed is None:
        return None
    rows = yield _BY_HASH(key_hash=hashed)
    if not rows or not compare_digest(rows[0].key_hash, hashed):
        return None
    return Identity(rows[0].id, rows[0].workspace_id)


@lru_cache(maxsize=256)  # there are fewer than 256 different SELECTs
def with_key(select: str) -> str:
    """Return the given SELECT, extended to look up the API key whose id is ``this_key``.

    If the combined query returns no row, the key is not valid. If the key is valid but the given SELECT returns no row,
    ``is_row`` is null. ``key_now`` is the start time of the transaction.
    """
    return f"""
        SELECT k.id AS key_id, now() AS key_now, this.*
          FROM api_keys k
          LEFT JOIN LATERAL (SELECT true AS is_row, s.* FROM ({select}) s) this ON true
         WHERE k.id = %(this_key)s AND {_VALID}
    """  # noqa: S608 - no input, only statements of ours


# The update is skipped if another process is recording a use of the key.
_RECORD_USE = Statement("""
    UPDATE api_keys SET last_used_at = now()
     WHERE id = (SELECT id FROM api_keys
                  WHERE id = :id AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')
                    FOR NO KEY UPDATE SKIP LOCKED)
    RETURNING id
""")


@Rule
def record_use(key_id: UUID) -> Steps[bool]:
    """Record the API key's use without waiting for locks; return whether the use was recorded.

    At most one use per minute is recorded for each key.
    """
    return bool((yield _RECORD_USE(id=key_id)))


def hash_of(key: str) -> bytes | None:
    """Return the stored hash of an API key, or None if the key is malformed.

    >>> hash_of("fup_" + "A" * 43 + "wrong!") is None
    True
    """
    if not key.startswith(PREFIX) or not key.isascii():
        return None
    if len(key) == _LENGTH + _CHECKSUM_LENGTH:
        if key[_LENGTH:] != _checksum(key[:_LENGTH]):
            return None
    elif len(key) != _LENGTH:
        return None
    return sha256(key.encode()).digest()


def _checksum(key: str) -> str:
    """Return the checksum of an API key's first part: the CRC-32 in URL-safe base 64."""
    return urlsafe_b64encode(crc32(key.encode()).to_bytes(4)).decode().rstrip("=")
