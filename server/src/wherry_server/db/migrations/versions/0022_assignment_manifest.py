"""The keys role finds the devices that are to run an encrypted bundle."""

from __future__ import annotations

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward."""
    op.create_index("ix_assignment_manifest", "assignment", ["to_manifest"])


def downgrade() -> None:
    """Go one step back."""
    op.drop_index("ix_assignment_manifest", table_name="assignment")
