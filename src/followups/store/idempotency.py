"""Answers by Idempotency-Key: kept for a day, written in the same transaction as what the request did.

So there is no state between "done" and "remembered" that a crash could leave behind: both are there, or
neither is. While a request runs it holds an advisory lock on its key, which ends with its transaction,
however that ends; another request with the key does not wait for it.
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
"""Expired answers that go when a new one comes: the table shrinks to a day's worth by itself."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer as it was given: status, `Location` if it had one, and the body's bytes."""

    status: int
    location: str | None
    body: bytes


def hash_of(request: bytes) -> bytes:
    """Return what tells two requests apart."""
    return sha256(request).digest()


_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(:number)")


def recall(session: Session, workspace_id: UUID, key: str, request_hash: bytes) -> Answer | None:
    """Take the key until the transaction ends, and return the answer it already had, if any.

    Raises `IdempotencyKeyInUseError` while another request holds the key, and
    `IdempotencyKeyReusedError` when its answer was to another request.
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
    """Keep the answer for a day; the caller holds the key by `recall`."""
    values = {
        "request_hash": request_hash,
        "status": answer.status,
        "location": answer.location,
        "body": answer.body,
        "created_at": func.now(),
    }
    statement = insert(IdempotencyKey).values(workspace_id=workspace_id, key=key, **values)
    # One that stands there has expired, or `recall` would have returned it.
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
    # PostgreSQL names such locks by 64 bits, signed. Two keys that fall on the same number would only
    # refuse each other while both run.
    digest = sha256(b"idempotency-key:" + workspace_id.bytes + key.encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
