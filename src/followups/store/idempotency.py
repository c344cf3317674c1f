"""Answers by Idempotency-Key: kept for a day, written in the same transaction as the request's changes.

So there is no state between "done" and "remembered" that a crash could leave behind: both exist, or neither. While a
request runs it holds an advisory lock on its key, which ends with its transaction, however that ends; another request
with the key does not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select, text, tuple_
from sqlalchemy.dialects.postgresql import insert

from followups.errors import IdempotencyKeyInUseError, IdempotencyKeyReusedError
from followups.models import IdempotencyKey

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

LIFETIME = timedelta(hours=24)
"""How long an answer is repeated."""

SWEPT = 2
"""Expired answers deleted with each new one, so that the table shrinks to a day's worth by itself."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A stored HTTP answer: status, `Location` if it had one, and the body's bytes."""

    status: int
    location: str | None
    body: bytes


def hash_of(request: bytes) -> bytes:
    """Return the hash that distinguishes two requests."""
    return sha256(request).digest()


_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(:number)")


def recall(session: Session, workspace_id: UUID, key: str, request_hash: bytes) -> Answer | None:
    """Lock the key until the transaction ends, and return its stored answer, or None.

    Raises `IdempotencyKeyInUseError` while another request holds the key, and `IdempotencyKeyReusedError` if the answer
    belongs to a different request.
    """
    if not session.scalar(_TRY_LOCK, {"number": _lock_number(workspace_id, key)}):
        raise IdempotencyKeyInUseError
    known = session.execute(
        select(IdempotencyKey.request_hash, IdempotencyKey.status, IdempotencyKey.location, IdempotencyKey.body).where(
            IdempotencyKey.workspace_id == workspace_id,
            IdempotencyKey.key == key,
            IdempotencyKey.created_at > func.now() - LIFETIME,
        )
    ).one_or_none()
    if known is None:
        return None
    if known.request_hash != request_hash:
        raise IdempotencyKeyReusedError(field="Idempotency-Key")
    return Answer(known.status, known.location, known.body)


def remember(session: Session, workspace_id: UUID, key: str, request_hash: bytes, answer: Answer) -> None:
    """Store the answer for a day; the caller holds the key through `recall`."""
    values = {
        "request_hash": request_hash,
        "status": answer.status,
        "location": answer.location,
        "body": answer.body,
        "created_at": func.now(),
    }
    statement = insert(IdempotencyKey).values(workspace_id=workspace_id, key=key, **values)
    # An existing one has expired, or `recall` would have returned it.
    session.execute(
        statement.on_conflict_do_update(index_elements=[IdempotencyKey.workspace_id, IdempotencyKey.key], set_=values)
    )
    _sweep(session)


def _sweep(session: Session) -> None:
    name = tuple_(IdempotencyKey.workspace_id, IdempotencyKey.key)
    expired = (
        select(IdempotencyKey.workspace_id, IdempotencyKey.key)
        .where(IdempotencyKey.created_at <= func.now() - LIFETIME)
        .order_by(IdempotencyKey.created_at)
        .limit(SWEPT)
        .with_for_update(skip_locked=True)
    )
    session.execute(delete(IdempotencyKey).where(name.in_(expired)), execution_options={"synchronize_session": False})


def _lock_number(workspace_id: UUID, key: str) -> int:
    # PostgreSQL names such locks by signed 64-bit numbers. Two keys with the same number only refuse each other while
    # both run.
    digest = sha256(b"idempotency-key:" + workspace_id.bytes + key.encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
