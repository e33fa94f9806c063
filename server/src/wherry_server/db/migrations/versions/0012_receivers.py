"""A webhook keeps how often its receiver failed in a row, and when it is asked again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

DUE = "ix_webhook_delivery_due"


def upgrade() -> None:
    """Go one step forward."""
    op.add_column("webhook", sa.Column("failures", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("webhook", sa.Column("open_at", sa.BigInteger(), nullable=False, server_default="0"))
    op.drop_index(DUE, table_name="webhook_delivery")
    op.create_index(DUE, "webhook_delivery", ["webhook_id", "state", "next_at"])


def downgrade() -> None:
    """Go one step back."""
    op.drop_index(DUE, table_name="webhook_delivery")
    op.create_index(DUE, "webhook_delivery", ["project_id", "state", "next_at"])
    op.drop_column("webhook", "open_at")
    op.drop_column("webhook", "failures")
