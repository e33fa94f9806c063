"""A token may be narrowed to models and cohorts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

SCOPES = ("models", "cohorts")


def upgrade() -> None:
    """Go one step forward."""
    for name in SCOPES:
        op.add_column("api_token", sa.Column(name, sa.JSON(), nullable=False, server_default=sa.text("'[]'")))


def downgrade() -> None:
    """Go one step back."""
    for name in SCOPES:
        op.drop_column("api_token", name)
