"""Stored responses, one for each Idempotency-Key, kept for a day.

The changes and the stored response are committed together, so after a crash, either both are stored or neither is.
While a request is running, its transaction holds an advisory lock on the idempotency key. A second request to the API
with the same key is refused instead of waiting for the lock. A second submission of a console form waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING

from followups.errors import IdempotencyKeyInUseError, IdempotencyKeyReusedError
from followups.statements import Rule, Statement

if TYPE_CHECKING:
    from uuid import UUID

    from followups.statements import Steps

LIFETIME = timedelta(hours=24)
"""How long a stored response is returned when its request is repeated."""

SWEPT = 2
"""Number of expired responses that are deleted whenever a new response is stored."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A stored HTTP response: status, `Location` if any, and the bytes of the body."""

    status: int
    location: str | None
    body: bytes


def hash_of(request: bytes) -> bytes:
    """Return a hash that distinguishes different requests with the same idempotency key."""
    return sha256(request).digest()


_TRY_LOCK = Statement("SELECT pg_try_advisory_xact_lock(:number) AS locked")
_LOCK = Statement("SELECT true AS locked FROM pg_advisory_xact_lock(:number)")
_KNOWN = Statement("""
    SELECT request_hash, status, location, body FROM idempotency_keys
     WHERE workspace_id = :workspace_id AND key = :key AND created_at > now() - CAST(:lifetime AS interval)
""")


@Rule
def recall(workspace_id: UUID, key: str, request_hash: bytes, *, wait: bool = False) -> Steps[StoredResponse | None]:
    """Lock the idempotency key until the transaction ends, and return its stored response, or None.

    If another request with the key is running, wait for it if ``wait`` is true; otherwise raise
    `IdempotencyKeyInUseError`. Raises `IdempotencyKeyReusedError` if the stored response belongs to a different
    request.
    """
    (row,) = yield (_LOCK if wait else _TRY_LOCK)(number=_lock_number(workspace_id, key))
    if not row.locked:
        raise IdempotencyKeyInUseError
    found = yield _KNOWN(workspace_id=workspace_id, key=key, lifetime=LIFETIME)
    if not found:
        return None
    (known,) = found
    if known.request_hash != request_hash:
        raise IdempotencyKeyReusedError(field="Idempotency-Key")
    return StoredResponse(known.status, known.location, known.body)


# A stored response found here has expired, because `recall` would have returned a valid one.
_REMEMBER = Statement("""
    INSERT INTO idempotency_keys (workspace_id, key, request_hash, status, location, body, created_at)
    VALUES (:workspace_id, :key, :request_hash, :status, CAST(:location AS text), :body, now())
    ON CONFLICT (workspace_id, key) DO UPDATE
       SET request_hash = excluded.request_hash, status = excluded.status, location = excluded.location,
           body = excluded.body, created_at = excluded.created_at
""")
_SWEEP = Statement("""
    DELETE FROM idempotency_keys
     WHERE (workspace_id, key) IN (
           SELECT workspace_id, key FROM idempotency_keys
            WHERE created_at <= now() - CAST(:lifetime AS interval)
            ORDER BY created_at LIMIT :most
              FOR UPDATE SKIP LOCKED)
""")


@Rule
def remember(workspace_id: UUID, key: str, request_hash: bytes, answer: StoredResponse) -> Steps[None]:
    """Store the response for a day; the caller must have locked the key through `recall`."""
    yield _REMEMBER(
        workspace_id=workspace_id,
        key=key,
        request_hash=request_hash,
        status=answer.status,
        location=answer.location,
        body=answer.body,
    )
    yield _SWEEP(lifetime=LIFETIME, most=SWEPT)


def _lock_number(workspace_id: UUID, key: str) -> int:
    # PostgreSQL identifies advisory locks by signed 64-bit numbers. If two keys have the same lock number, one request
    # may be refused while the other is running.
    digest = sha256(b"idempotency-key:" + workspace_id.bytes + key.encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
