"""What is to be published has small rows of its own: to mark an offer no more writes the whole offer again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.create_table(
        "unpublished",
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("serial", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("device_id"),
    )
    op.execute(
        "INSERT INTO unpublished (device_id, project_id, epoch, serial)"
        " SELECT device_id, project_id, epoch, serial FROM offer WHERE published = false"
    )
    op.drop_index("ix_offer_unpublished", table_name="offer")
    op.drop_column("offer", "published")


def downgrade() -> None:
    """Go one step back: everything is published once more."""
    op.add_column("offer", sa.Column("published", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("ix_offer_unpublished", "offer", ["published", "device_id"])
    op.drop_table("unpublished")
