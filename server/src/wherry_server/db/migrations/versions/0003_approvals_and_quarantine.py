"""Approvals of stages, and when a device was let out of quarantine."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.create_table(
        "approval",
        sa.Column("rollout_id", sa.String(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("rollout_id", "stage", "actor"),
    )
    op.add_column("assignment", sa.Column("released_at", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Go one step back."""
    op.drop_column("assignment", "released_at")
    op.drop_table("approval")
