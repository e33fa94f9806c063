"""A device that leaves the fleet is told what to remove."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.add_column("device", sa.Column("wipe", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    """Go one step back."""
    op.drop_column("device", "wipe")
