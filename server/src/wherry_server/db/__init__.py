"""Tables and transactions. SQLModel defines; the ingest path uses the table objects and never the ORM."""
