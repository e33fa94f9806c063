"""Entries of the audit log are sealed and cannot be changed; how long the log of a project is, is kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

CHANGES = ("update", "delete")


def upgrade() -> None:
    """Go one step forward."""
    op.add_column("audit_entry", sa.Column("seal", sa.String(), nullable=False, server_default=""))
    op.create_table(
        "audit_head",
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("entries", sa.BigInteger(), nullable=False),
        sa.Column("entry_id", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("seal", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("project_id"),
    )
    op.execute(
        "INSERT INTO audit_head (project_id, entries, entry_id, hash, seal)"
        " SELECT e.project_id, l.entries, e.id, e.hash, '' FROM audit_entry e JOIN"
        " (SELECT project_id, count(*) AS entries, max(id) AS last FROM audit_entry GROUP BY project_id) l ON l.last = e.id"
    )
    if op.get_bind().dialect.name == "sqlite":
        for change in CHANGES:
            op.execute(
                f"CREATE TRIGGER audit_entry_{change} BEFORE {change.upper()} ON audit_entry"
                " BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION audit_entry_kept() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_entry_kept BEFORE UPDATE OR DELETE ON audit_entry"
        " FOR EACH ROW EXECUTE FUNCTION audit_entry_kept()"
    )


def downgrade() -> None:
    """Go one step back."""
    if op.get_bind().dialect.name == "sqlite":
        for change in CHANGES:
            op.execute(f"DROP TRIGGER audit_entry_{change}")
    else:
        op.execute("DROP TRIGGER audit_entry_kept ON audit_entry")
        op.execute("DROP FUNCTION audit_entry_kept()")
    op.drop_table("audit_head")
    op.drop_column("audit_entry", "seal")
