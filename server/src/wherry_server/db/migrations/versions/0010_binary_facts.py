"""Facts and labels of devices in PostgreSQL's binary form: a selector looks into a hundred thousand of them at once."""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go one step forward; NUL, which that form cannot hold, becomes the replacement character."""
    if op.get_bind().dialect.name == "postgresql":
        for column in ("facts", "labels"):
            told = rf"CAST(replace(CAST({column} AS TEXT), '\u0000', '\ufffd') AS JSONB)"
            op.execute(f"ALTER TABLE device ALTER COLUMN {column} TYPE JSONB USING {told}")


def downgrade() -> None:
    """Go one step back."""
    if op.get_bind().dialect.name == "postgresql":
        for column in ("facts", "labels"):
            op.execute(f"ALTER TABLE device ALTER COLUMN {column} TYPE JSON USING CAST({column} AS JSON)")
