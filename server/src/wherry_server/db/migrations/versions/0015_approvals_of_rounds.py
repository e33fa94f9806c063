"""An approval is of a stage of one of two rounds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

KEPT = "rollout_id, stage, actor, project_id, at"


def _make(*more: sa.Column[int]) -> None:
    """Make the table anew: SQLite cannot give one another primary key."""
    op.create_table(
        "approval_made",
        sa.Column("rollout_id", sa.String(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        *more,
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("rollout_id", "stage", *(column.name for column in more), "actor"),
    )


def _take_over() -> None:
    op.drop_table("approval")
    op.rename_table("approval_made", "approval")


def upgrade() -> None:
    """Go one step forward."""
    _make(sa.Column("round", sa.Integer(), nullable=False, server_default="1"))
    op.execute(f"INSERT INTO approval_made ({KEPT}) SELECT {KEPT} FROM approval")  # noqa: S608  # our own names
    _take_over()


def downgrade() -> None:
    """Go one step back; what was approved of second rounds is forgotten."""
    _make()
    op.execute(f"INSERT INTO approval_made ({KEPT}) SELECT {KEPT} FROM approval WHERE round = 1")  # noqa: S608  # our own names
    _take_over()
