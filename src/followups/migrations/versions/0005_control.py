"""Add pauses, sending hours and retries, and vacuum settings for tables with pruned rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

CHURNING = ("chat_messages", "failed_attempts", "idempotency_keys")


def upgrade() -> None:
    """Create the tables and add the columns. No column has a default, so the migration rewrites no rows."""
    op.create_table(
        "pauses",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("workspace_id", sa.Uuid(), nullable=True),
        sa.Column("channel", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("workspace_id IS NOT NULL OR channel IS NOT NULL", name=op.f("ck_pauses_names_something")),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_pauses_workspace_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pauses")),
    )
    op.create_index(
        "ix_pauses_scope",
        "pauses",
        [
            sa.literal_column("COALESCE(workspace_id, '00000000-0000-0000-0000-000000000000'::uuid)"),
            sa.literal_column("COALESCE(channel, '')"),
        ],
        unique=True,
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_table(
        "sending_hours",
        sa.Column("workspace_id", sa.Uuid(), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("opening", sa.Time(), nullable=False),
        sa.Column("closing", sa.Time(), nullable=False),
        sa.Column("days", sa.SmallInteger(), nullable=False),
        sa.Column("open_from", sa.DateTime(timezone=True), nullable=False),
        sa.Column("open_until", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("days BETWEEN 1 AND 127", name=op.f("ck_sending_hours_days_are_a_week_s")),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name=op.f("fk_sending_hours_workspace_id")),
        sa.PrimaryKeyConstraint("workspace_id", name=op.f("pk_sending_hours")),
    )
    op.add_column("follow_ups", sa.Column("held_until", sa.DateTime(timezone=True), nullable=True))
    op.add_column("follow_ups", sa.Column("pause_id", sa.Uuid(), nullable=True))
    op.add_column("follow_ups", sa.Column("retry_of", sa.Uuid(), nullable=True))
    for table in CHURNING:
        op.execute(
            f"ALTER TABLE {table} SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02)"
        )


def downgrade() -> None:
    """Drop the tables and the columns."""
    for table in CHURNING:
        op.execute(f"ALTER TABLE {table} RESET (autovacuum_vacuum_scale_factor, autovacuum_analyze_scale_factor)")
    for column in ("retry_of", "pause_id", "held_until"):
        op.drop_column("follow_ups", column)
    op.drop_table("sending_hours")
    op.drop_table("pauses")
