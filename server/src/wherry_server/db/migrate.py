"""Brings a database to the newest schema; every server process calls it before it opens the database."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

SCRIPTS = Path(__file__).parent / "migrations"


def config(url: str) -> Config:
    """Return Alembic's configuration for a database URL, without a file."""
    made = Config()
    made.set_main_option("script_location", str(SCRIPTS))
    made.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return made


def upgrade(url: str) -> None:
    """Run the migrations that are missing. Not from inside an event loop: the script runs one of its own."""
    command.upgrade(config(url), "head")
