"""Every certificate of a device is known until it expires, so that all of them can be revoked."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.create_table(
        "device_certificate",
        sa.Column("serial", sa.String(), primary_key=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("issued_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_device_certificate_device_id", "device_certificate", ["device_id"])
    op.create_table(
        "session_cut",
        sa.Column("device_id", sa.String(), primary_key=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("asked_at", sa.BigInteger(), nullable=False),
    )
    op.execute(
        "INSERT INTO device_certificate (serial, project_id, device_id, issued_at, expires_at, revoked_at)"
        " SELECT certificate_serial, project_id, id, enrolled_at, certificate_expires_at,"
        " CASE WHEN state = 'active' THEN 0 ELSE enrolled_at END FROM device WHERE certificate_serial <> ''"
    )


def downgrade() -> None:
    """Go one step back."""
    op.drop_table("session_cut")
    op.drop_table("device_certificate")
