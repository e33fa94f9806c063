"""What gates compare beside errors and latency: crashes of a window's worker, and what the application told of its answers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.add_column(
        "telemetry_window", sa.Column("crashes", sa.BigInteger(), nullable=False, server_default=sa.text("0"))
    )
    op.create_table(
        "telemetry_metric",
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("epoch", sa.String(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("manifest", sa.String(), nullable=False),
        sa.Column("arm", sa.String(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("device_id", "epoch", "seq", "position", "name"),
    )
    op.create_index("ix_metric_model", "telemetry_metric", ["project_id", "model", "name", "start"])


def downgrade() -> None:
    """Go one step back."""
    op.drop_table("telemetry_metric")
    op.drop_column("telemetry_window", "crashes")
