"""Content keys of encrypted blobs: sealed for the keys role, and wrapped for devices."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.add_column("device", sa.Column("content_key", sa.String(), nullable=False, server_default=""))
    op.create_table(
        "content_key",
        sa.Column("project_id", sa.String(), primary_key=True),
        sa.Column("manifest", sa.String(), primary_key=True),
        sa.Column("blob", sa.String(), primary_key=True),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("plain", sa.String(), nullable=False),
        sa.Column("recipient", sa.String(), nullable=False),
        sa.Column("sealed", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_content_key_recipient", "content_key", ["recipient"])
    op.create_table(
        "wrapped_key",
        sa.Column("device_id", sa.String(), primary_key=True),
        sa.Column("blob", sa.String(), primary_key=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("plain", sa.String(), nullable=False),
        sa.Column("public", sa.String(), nullable=False),
        sa.Column("recipient", sa.String(), nullable=False),
        sa.Column("sealed", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
    )


def downgrade() -> None:
    """Go one step back."""
    op.drop_table("wrapped_key")
    op.drop_table("content_key")
    op.drop_column("device", "content_key")
