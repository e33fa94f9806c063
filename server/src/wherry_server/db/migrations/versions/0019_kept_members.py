"""Whom static cohorts keep: lists of devices, by a name that selectors give."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.create_table(
        "kept_member",
        sa.Column("list_id", sa.String(), nullable=False),
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("list_id", "device_id"),
    )
    op.add_column("cohort", sa.Column("kept", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("cohort", sa.Column("kept_from", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    """Go one step back; a cohort of a list takes nobody then."""
    op.drop_column("cohort", "kept_from")
    op.drop_column("cohort", "kept")
    op.drop_table("kept_member")
