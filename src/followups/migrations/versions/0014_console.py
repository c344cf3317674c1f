"""Add the console's sessions, single-use sign-in links, and bulk actions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0014"
down_revision = "0013"

ROLES = "role IN ('viewer', 'agent', 'admin', 'operator')"
OPERATOR = "role <> 'operator' OR workspace_id IS NULL"
CHAT = "chat_id IS NULL OR workspace_id IS NOT NULL"
NOW = sa.text("now()")
CHURNING = {"autovacuum_vacuum_scale_factor": "0.02", "autovacuum_analyze_scale_factor": "0.02"}


def _time(name: str, *, now: bool = False, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), server_default=NOW if now else None, nullable=nullable)


def _owner(name: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=op.f(name), ondelete="CASCADE")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "console_sessions",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Uuid(), nullable=True),
        sa.Column("chat_id", sa.Uuid(), nullable=True),
        sa.Column("way", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        _time("created_at", now=True),
        _time("seen_at", now=True),
        _time("expires_at"),
        _time("ended_at", nullable=True),
        sa.CheckConstraint(ROLES, name=op.f("ck_console_sessions_role_is_known")),
        sa.CheckConstraint(OPERATOR, name=op.f("ck_console_sessions_operator_sees_all")),
        sa.CheckConstraint(CHAT, name=op.f("ck_console_sessions_chat_has_workspace")),
        _owner("fk_console_sessions_workspace_id", "workspace_id", "workspaces.id"),
        _owner("fk_console_sessions_api_key_id", "api_key_id", "api_keys.id"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_console_sessions")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_console_sessions_token_hash")),
        postgresql_with=CHURNING,
    )
    op.create_index(
        op.f("ix_console_sessions_workspace_id_created_at"), "console_sessions", ["workspace_id", "created_at"]
    )
    op.create_index(op.f("ix_console_sessions_expires_at"), "console_sessions", ["expires_at"])
    op.create_index(op.f("ix_console_sessions_api_key_id"), "console_sessions", ["api_key_id"])
    op.create_table(
        "console_links",
        sa.Column("token_hash", sa.LargeBinary(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Uuid(), nullable=True),
        sa.Column("chat_id", sa.Uuid(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        _time("created_at", now=True),
        _time("expires_at"),
        _time("used_at", nullable=True),
        sa.CheckConstraint(ROLES, name=op.f("ck_console_links_role_is_known")),
        sa.CheckConstraint(OPERATOR, name=op.f("ck_console_links_operator_sees_all")),
        sa.CheckConstraint(CHAT, name=op.f("ck_console_links_chat_has_workspace")),
        _owner("fk_console_links_workspace_id", "workspace_id", "workspaces.id"),
        _owner("fk_console_links_api_key_id", "api_key_id", "api_keys.id"),
        sa.PrimaryKeyConstraint("token_hash", name=op.f("pk_console_links")),
    )
    op.create_index(op.f("ix_console_links_expires_at"), "console_links", ["expires_at"])
    op.create_index(op.f("ix_console_links_workspace_id"), "console_links", ["workspace_id"])
    op.create_index(op.f("ix_console_links_api_key_id"), "console_links", ["api_key_id"])
    op.create_table(
        "bulk_actions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("workspace_id", sa.Uuid(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("chosen", JSONB(), nullable=False),
        _time("created_at", now=True),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("expected", sa.Integer(), nullable=False),
        _time("ended_at_time", nullable=True),
        sa.Column("ended_at_id", sa.Uuid(), nullable=True),
        sa.Column("done", sa.Integer(), server_default="0", nullable=False),
        sa.Column("passed_over", JSONB(), server_default="{}", nullable=False),
        _time("stopped_at", nullable=True),
        _time("finished_at", nullable=True),
        sa.CheckConstraint("kind IN ('cancel', 'retry')", name=op.f("ck_bulk_actions_kind_is_known")),
        _owner("fk_bulk_actions_workspace_id", "workspace_id", "workspaces.id"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bulk_actions")),
    )
    op.create_index(op.f("ix_bulk_actions_created_at"), "bulk_actions", ["created_at"])
    op.create_index(op.f("ix_bulk_actions_workspace_id"), "bulk_actions", ["workspace_id"])
    op.create_index(
        "ix_bulk_actions_open",
        "bulk_actions",
        ["created_at", "id"],
        postgresql_where=sa.text("finished_at IS NULL"),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("bulk_actions")
    op.drop_table("console_links")
    op.drop_table("console_sessions")
