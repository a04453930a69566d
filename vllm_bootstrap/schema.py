"""Numbered migrations and named queries: the SQL that lies in files. Blocking; for the time before and at start.

Invariant: a database is always at one complete version. Each migration runs once, in a transaction of its own, and a
database that a newer program wrote is never touched.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path

MIGRATIONS = Path(__file__).with_name("migrations")


class CannotOpen(Exception):
    """The database cannot be used; the message says why and what to do."""


class Damaged(CannotOpen):
    """What is stored is not whole: opening it again would not go better."""


class NewerSchema(CannotOpen):
    """The database was written by a newer version of this program."""

    def __init__(self, path: Path, found: int, known: int) -> None:
        super().__init__(
            f"{path} has schema version {found}, this program knows versions up to {known}: "
            "start the newer program that wrote it, or use another state directory"
        )
        self.found = found
        self.known = known


def pending_migrations(conn: sqlite3.Connection, path: Path, migrations: Path = MIGRATIONS) -> list[tuple[int, Path]]:
    """The migrations this database has not seen, in order. Only reads. Raises ``NewerSchema``."""
    scripts = {int(file.name[:4]): file for file in sorted(migrations.glob("[0-9]*.sql"))}
    if sorted(scripts) != list(range(1, len(scripts) + 1)):
        raise ValueError(f"migrations in {migrations} must be numbered 0001, 0002, … without gaps")
    found = int(conn.execute("PRAGMA user_version").fetchone()[0])
    if found > len(scripts):
        raise NewerSchema(path, found, len(scripts))
    return [(number, scripts[number]) for number in range(found + 1, len(scripts) + 1)]


def migrate(conn: sqlite3.Connection, path: Path, migrations: Path = MIGRATIONS) -> None:
    """Run the migrations this database has not seen, each in a transaction of its own. Idempotent.

    Raises ``NewerSchema``, or what SQLite raises: the file then stays at the last version that was complete.
    """
    for number, file in pending_migrations(conn, path, migrations):
        script = file.read_text()
        try:
            conn.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version={number};\nCOMMIT;")
        except sqlite3.Error:
            if conn.in_transaction:
                conn.execute("ROLLBACK")
            raise


def load_queries(path: Path) -> Mapping[str, str]:
    """The statements of a ``.sql`` file by the names its ``-- name: x`` lines give them. Raises ``ValueError``."""
    queries: dict[str, str] = {}
    for part in re.split(r"(?m)^-- name: ", path.read_text())[1:]:
        name, _, body = part.partition("\n")
        if name.strip() in queries:
            raise ValueError(f"{path} names {name.strip()} twice")
        queries[name.strip()] = body.strip().removesuffix(";")
    return queries
