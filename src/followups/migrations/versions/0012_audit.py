"""Add audit events, and a column for the time at which a workspace's deletion began."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Create the table and add the column. The column has no default, so no row is rewritten."""
    op.create_table(
        "audit_events",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("way", sa.Text(), nullable=False),
        sa.Column("actor_id", sa.Uuid(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Uuid(), nullable=True),
        sa.Column("workspace", sa.Text(), nullable=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target_id", sa.Uuid(), nullable=True),
        sa.Column("number", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("details", JSONB(), server_default="{}", nullable=False),
        sa.CheckConstraint(
            "way IN ('api', 'command', 'console', 'python', 'service')", name=op.f("ck_audit_events_way_is_known")
        ),
        sa.CheckConstraint("number >= 0", name=op.f("ck_audit_events_number_is_a_count")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.02", "autovacuum_analyze_scale_factor": "0.02"},
    )
    op.create_index("ix_audit_events_at", "audit_events", ["at", "id"])
    op.create_index("ix_audit_events_workspace", "audit_events", ["workspace_id", "at", "id"])
    op.create_index(
        "ix_audit_events_target", "audit_events", ["target_id"], postgresql_where=sa.text("target_id IS NOT NULL")
    )
    op.add_column("workspaces", sa.Column("deletion_began_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Drop the table and the column."""
    op.drop_column("workspaces", "deletion_began_at")
    op.drop_table("audit_events")
