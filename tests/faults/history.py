"""The database's history: every change of a follow-up, kept by a trigger that only fault tests install."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Engine

_INSTALL = """
    CREATE TABLE history (
        number bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(), id uuid NOT NULL,
        old_status text, status text NOT NULL, reason text, begun_at timestamptz, lease_token bigint NOT NULL,
        changed_when_final boolean NOT NULL, began boolean NOT NULL
    );
    CREATE FUNCTION keep_history() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO history (id, old_status, status, reason, begun_at, lease_token, changed_when_final, began)
        VALUES (
            NEW.id, CASE TG_OP WHEN 'UPDATE' THEN OLD.status END, NEW.status, NEW.reason, NEW.begun_at, NEW.lease_token,
            -- chat_message_id may be filled in later; nothing else of what others read may change.
            CASE TG_OP WHEN 'UPDATE' THEN OLD.status <> 'pending' AND
                (NEW.status, NEW.reason, NEW.finished_at, NEW.message, NEW.due_date, NEW.chat_id)
                IS DISTINCT FROM (OLD.status, OLD.reason, OLD.finished_at, OLD.message, OLD.due_date, OLD.chat_id)
            ELSE false END,
            CASE TG_OP WHEN 'UPDATE' THEN NEW.begun_at IS NOT NULL AND NEW.begun_at IS DISTINCT FROM OLD.begun_at
            ELSE false END
        );
        RETURN NULL;
    END $$;
    CREATE TRIGGER keep_history AFTER INSERT OR UPDATE ON follow_ups FOR EACH ROW EXECUTE FUNCTION keep_history();
"""


def install(engine: Engine) -> None:
    """Keep history from now on."""
    with engine.begin() as connection:
        connection.execute(text(_INSTALL))


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one follow-up, in the order of commits for each."""

    id: UUID
    at: datetime
    old_status: str | None
    status: str
    began: bool
    """An attempt began with this change."""
    changed_when_final: bool


def changes(engine: Engine) -> list[Change]:
    """Return the history, oldest first."""
    query = text("SELECT id, at, old_status, status, began, changed_when_final FROM history ORDER BY number")
    with engine.connect() as connection:
        return [Change(*row) for row in connection.execute(query)]
