"""Add rate limits for deliveries, and a column with the time until which one delays a follow-up."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Create the table and add the column. The column has no default, so no row is rewritten."""
    op.create_table(
        "rate_limits",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("workspace_id", sa.Uuid(), nullable=True),
        sa.Column("channel", sa.Text(), nullable=True),
        sa.Column("per", sa.Text(), nullable=False),
        sa.Column("rate", sa.Double(), nullable=False),
        sa.Column("burst", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("per IN ('all', 'workspace', 'chat')", name=op.f("ck_rate_limits_per_is_known")),
        # PostgreSQL sorts NaN and infinity above every number, so only an upper bound rejects them.
        sa.CheckConstraint("rate > 0 AND rate <= 1000000", name=op.f("ck_rate_limits_rate_is_a_rate")),
        sa.CheckConstraint("burst BETWEEN 1 AND 1000000", name=op.f("ck_rate_limits_burst_lets_one_go")),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_rate_limits_workspace_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rate_limits")),
    )
    op.create_index(
        "ix_rate_limits_scope",
        "rate_limits",
        [
            sa.literal_column("COALESCE(workspace_id, '00000000-0000-0000-0000-000000000000'::uuid)"),
            sa.literal_column("COALESCE(channel, '')"),
            "per",
        ],
        unique=True,
    )
    op.add_column("follow_ups", sa.Column("limited_until", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Drop the table and the column."""
    op.drop_column("follow_ups", "limited_until")
    op.drop_table("rate_limits")
