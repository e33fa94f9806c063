"""Devices may be let in by their key or by a person, and are put into quarantine with a reason."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.add_column("device", sa.Column("state_reason", sa.String(), nullable=False, server_default=""))
    op.add_column("device", sa.Column("places", sa.JSON(), nullable=True))
    op.add_column("enrolment_token", sa.Column("hold", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "enrolment_request",
        sa.Column("project_id", sa.String(), primary_key=True),
        sa.Column("key_digest", sa.String(), primary_key=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
    )


def downgrade() -> None:
    """Go one step back."""
    op.drop_table("enrolment_request")
    op.drop_column("enrolment_token", "hold")
    op.drop_column("device", "places")
    op.drop_column("device", "state_reason")
