"""Enrolment finds the device that has a key."""

from __future__ import annotations

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.create_index("ix_device_key", "device", ["project_id", "key_digest"])


def downgrade() -> None:
    """Go one step back."""
    op.drop_index("ix_device_key", table_name="device")
