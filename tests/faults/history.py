"""A history of all changes to follow-ups, recorded by a trigger that only fault tests install."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Engine

INSTALL = """
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


_REWRITTEN = text("SELECT count(*) FROM history WHERE changed_when_final")
# A join would be slow here, because the planner would choose a nested loop.
_BEGUN_AFTER_CANCEL = text("""
    SELECT id FROM history
     GROUP BY id HAVING min(number) FILTER (WHERE status = 'cancelled') < max(number) FILTER (WHERE began)
""")


def rewritten(engine: Engine) -> int:
    """Return how often a follow-up was changed after it had finished."""
    with engine.connect() as connection:
        return int(connection.execute(_REWRITTEN).scalar_one())


def begun_after_cancel(engine: Engine) -> set[UUID]:
    """Return the cancelled follow-ups with an attempt that began after the cancel."""
    with engine.connect() as connection:
        return set(connection.scalars(_BEGUN_AFTER_CANCEL))
