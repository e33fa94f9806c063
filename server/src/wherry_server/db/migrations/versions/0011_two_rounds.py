"""An assignment says whether its candidate runs beside the incumbent, and what a shadow came to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

COUNTS = ("compared", "agreed", "skipped")


def upgrade() -> None:
    """Go one step forward."""
    op.add_column("assignment", sa.Column("tried", sa.Boolean(), nullable=False, server_default=sa.false()))
    for name in COUNTS:
        op.add_column("assignment", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Go one step back."""
    for name in ("tried", *COUNTS):
        op.drop_column("assignment", name)
