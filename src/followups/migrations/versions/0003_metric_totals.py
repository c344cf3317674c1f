"""Add a table with the sums of all processes' counters, so that any process can answer a scrape."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "metric_totals",
        sa.Column("sample", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sample", "labels", name=op.f("pk_metric_totals")),
        postgresql_with={"fillfactor": "50"},
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("metric_totals")
