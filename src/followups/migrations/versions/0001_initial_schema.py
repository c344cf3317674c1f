"""Initial schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "dispatcher_state",
        sa.Column("id", sa.Integer(), autoincrement=False, server_default="1", nullable=False),
        sa.Column("last_tick_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("id = 1", name=op.f("ck_dispatcher_state_only_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dispatcher_state")),
    )
    op.execute("INSERT INTO dispatcher_state DEFAULT VALUES")
    op.create_table(
        "workspaces",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workspaces")),
        sa.UniqueConstraint("name", name=op.f("uq_workspaces_name")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("workspace_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_api_keys_workspace_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("key_hash", name=op.f("uq_api_keys_key_hash")),
    )
    op.create_index(op.f("ix_api_keys_workspace_id"), "api_keys", ["workspace_id"], unique=False)
    op.create_table(
        "chats",
        sa.Column("workspace_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("channel", sa.Text(), server_default="api", nullable=False),
        sa.Column("external_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_message_id", sa.Uuid(), nullable=True),
        sa.Column("last_message_role", sa.Text(), nullable=True),
        sa.Column("last_message_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_user_message_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "channel IN ('widget', 'waha', 'whatsapp', 'instagram', 'api', 'matrix')",
            name=op.f("ck_chats_channel_is_known"),
        ),
        sa.CheckConstraint(
            "(last_message_id IS NULL) = (last_message_at IS NULL)"
            " AND (last_message_id IS NULL) = (last_message_role IS NULL)",
            name=op.f("ck_chats_last_message_is_whole"),
        ),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_chats_workspace_id")),
        sa.PrimaryKeyConstraint("workspace_id", "id", name=op.f("pk_chats")),
    )
    op.create_table(
        "chat_messages",
        sa.Column("workspace_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("chat_id", sa.Uuid(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("role IN ('user', 'agent', 'operator')", name=op.f("ck_chat_messages_role_is_known")),
        sa.ForeignKeyConstraint(
            ["workspace_id", "chat_id"],
            ["chats.workspace_id", "chats.id"],
            name=op.f("fk_chat_messages_workspace_id_chat_id"),
        ),
        sa.PrimaryKeyConstraint("workspace_id", "id", name=op.f("pk_chat_messages")),
    )
    op.create_index(
        op.f("ix_chat_messages_workspace_id_chat_id_created_at"),
        "chat_messages",
        ["workspace_id", "chat_id", "created_at"],
        unique=False,
    )
    op.create_table(
        "follow_ups",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("workspace_id", sa.Uuid(), nullable=False),
        sa.Column("chat_id", sa.Uuid(), nullable=False),
        sa.Column("chat_message_id", sa.Uuid(), nullable=True),
        sa.Column("due_date", sa.DateTime(timezone=True), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("trigger_chat_message_id", sa.Uuid(), nullable=False),
        sa.Column("scheduled_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("waits_for", sa.Uuid(), nullable=True),
        sa.Column("lease_token", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("begun_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("losses", sa.Integer(), server_default="0", nullable=False),
        sa.Column("snoozes", sa.Integer(), server_default="0", nullable=False),
        sa.Column("cancel_requested", sa.Text(), nullable=True),
        sa.Column("accepted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(status = 'pending') = (finished_at IS NULL)", name=op.f("ck_follow_ups_final_has_finished_at")
        ),
        sa.CheckConstraint(
            "(status IN ('failed', 'cancelled')) = (reason IS NOT NULL)", name=op.f("ck_follow_ups_reason_explains")
        ),
        sa.CheckConstraint(
            "status IN ('pending', 'sent', 'failed', 'cancelled')", name=op.f("ck_follow_ups_status_is_known")
        ),
        sa.CheckConstraint(
            "attempts >= 0 AND losses >= 0 AND snoozes >= 0", name=op.f("ck_follow_ups_budgets_are_counts")
        ),
        sa.CheckConstraint("begun_at IS NULL OR lease_until IS NOT NULL", name=op.f("ck_follow_ups_begun_holds_lease")),
        sa.CheckConstraint(
            "due_date >= '0002-01-01 00:00:00+00' AND due_date < '9999-01-01 00:00:00+00'",
            name=op.f("ck_follow_ups_due_date_is_readable"),
        ),
        sa.CheckConstraint("waits_for IS NULL OR status = 'pending'", name=op.f("ck_follow_ups_waiting_is_pending")),
        sa.CheckConstraint("char_length(message) BETWEEN 1 AND 65536", name=op.f("ck_follow_ups_message_has_text")),
        sa.ForeignKeyConstraint(
            ["workspace_id", "chat_id"],
            ["chats.workspace_id", "chats.id"],
            name=op.f("fk_follow_ups_workspace_id_chat_id"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_follow_ups")),
        postgresql_with={
            "fillfactor": "85",
            "autovacuum_vacuum_scale_factor": "0.02",
            "autovacuum_analyze_scale_factor": "0.02",
        },
    )
    op.create_index(
        "ix_follow_ups_chat_order",
        "follow_ups",
        ["workspace_id", "chat_id", "due_date", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index(
        "ix_follow_ups_due",
        "follow_ups",
        [sa.literal_column("COALESCE(next_attempt_at, due_date)"), "id"],
        unique=False,
        postgresql_where=sa.text("status = 'pending' AND waits_for IS NULL"),
    )
    op.create_index(
        "ix_follow_ups_list", "follow_ups", ["workspace_id", sa.literal_column("created_at DESC"), "id"], unique=False
    )
    op.create_index(
        "ix_follow_ups_list_chat",
        "follow_ups",
        ["workspace_id", "chat_id", sa.literal_column("created_at DESC"), "id"],
        unique=False,
    )
    op.create_index(
        "ix_follow_ups_waits_for",
        "follow_ups",
        ["waits_for"],
        unique=False,
        postgresql_where=sa.text("waits_for IS NOT NULL"),
    )
    op.create_table(
        "failed_attempts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("follow_up_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("duration", sa.Interval(), nullable=True),
        sa.ForeignKeyConstraint(
            ["follow_up_id"], ["follow_ups.id"], name=op.f("fk_failed_attempts_follow_up_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_failed_attempts")),
    )
    op.create_index(op.f("ix_failed_attempts_follow_up_id_id"), "failed_attempts", ["follow_up_id", "id"], unique=False)


def downgrade() -> None:
    """Drop every table."""
    op.drop_index(op.f("ix_failed_attempts_follow_up_id_id"), table_name="failed_attempts")
    op.drop_table("failed_attempts")
    op.drop_index("ix_follow_ups_waits_for", table_name="follow_ups", postgresql_where=sa.text("waits_for IS NOT NULL"))
    op.drop_index("ix_follow_ups_list_chat", table_name="follow_ups")
    op.drop_index("ix_follow_ups_list", table_name="follow_ups")
    op.drop_index(
        "ix_follow_ups_due",
        table_name="follow_ups",
        postgresql_where=sa.text("status = 'pending' AND waits_for IS NULL"),
    )
    op.drop_index("ix_follow_ups_chat_order", table_name="follow_ups", postgresql_where=sa.text("status = 'pending'"))
    op.drop_table("follow_ups")
    op.drop_index(op.f("ix_chat_messages_workspace_id_chat_id_created_at"), table_name="chat_messages")
    op.drop_table("chat_messages")
    op.drop_table("chats")
    op.drop_index(op.f("ix_api_keys_workspace_id"), table_name="api_keys")
    op.drop_table("api_keys")
    op.drop_table("workspaces")
    op.drop_table("dispatcher_state")
