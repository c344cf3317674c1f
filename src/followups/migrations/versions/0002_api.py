"""Add stored responses by idempotency key, and an index for each filter of the lists."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table and the indexes."""
    op.create_table(
        "idempotency_keys",
        sa.Column("workspace_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("location", sa.Text(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_idempotency_keys_workspace_id")),
        sa.PrimaryKeyConstraint("workspace_id", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"])
    op.drop_index("ix_follow_ups_list", table_name="follow_ups")
    op.create_index(
        "ix_follow_ups_list", "follow_ups", ["workspace_id", "status", sa.literal_column("created_at DESC"), "id"]
    )
    op.create_index("ix_follow_ups_trigger", "follow_ups", ["workspace_id", "trigger_chat_message_id"])
    op.create_index(
        "ix_follow_ups_chat_message",
        "follow_ups",
        ["workspace_id", "chat_message_id"],
        postgresql_where=sa.text("chat_message_id IS NOT NULL"),
    )


def downgrade() -> None:
    """Drop the table and the indexes."""
    op.drop_index("ix_follow_ups_chat_message", table_name="follow_ups")
    op.drop_index("ix_follow_ups_trigger", table_name="follow_ups")
    op.drop_index("ix_follow_ups_list", table_name="follow_ups")
    op.create_index("ix_follow_ups_list", "follow_ups", ["workspace_id", sa.literal_column("created_at DESC"), "id"])
    op.drop_index(op.f("ix_idempotency_keys_created_at"), table_name="idempotency_keys")
    op.drop_table("idempotency_keys")
