"""An assignment says itself whether its device is simulated: devices of a rollout are counted without looking at each."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.add_column("assignment", sa.Column("simulated", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE assignment SET simulated = true WHERE device_id IN (SELECT id FROM device WHERE simulated)")


def downgrade() -> None:
    """Go one step back."""
    op.drop_column("assignment", "simulated")
