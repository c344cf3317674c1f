"""Add the expiry of API keys, and quotas for a workspace's pending follow-ups and chats."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Add the column and create the table.

    The column is nullable and has no default, so no row is rewritten.
    """
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "quotas",
        sa.Column("workspace_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("most", sa.Integer(), nullable=False),
        sa.Column("room", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind IN ('pending', 'chats')", name=op.f("ck_quotas_kind_is_known")),
        sa.CheckConstraint("most >= 0 AND room BETWEEN 0 AND most", name=op.f("ck_quotas_room_is_within")),
        sa.ForeignKeyConstraint(
            ["workspace_id"], ["workspaces.id"], name=op.f("fk_quotas_workspace_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("workspace_id", "kind", name=op.f("pk_quotas")),
    )


def downgrade() -> None:
    """Drop the table and the column."""
    op.drop_table("quotas")
    op.drop_column("api_keys", "expires_at")
