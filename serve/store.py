"""Stored responses: what GET /v1/responses/{id} and previous_response_id read, in SQLite.

One file in the runtime folder, so that it survives a restart; bounded by number, bytes and age.
Each row belongs to one tenant, and nobody else can see that it exists. Knows no HTTP; rows are
JSON of the wire. Used by openai_compat.py.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import InvalidRequest, NotFound

log = logging.getLogger(__name__)

KEPT_SECONDS = 30 * 24 * 3600
LONGEST_CHAIN = 1000
_TABLE = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, previous TEXT, made REAL NOT NULL,
    bytes INTEGER NOT NULL, items TEXT NOT NULL, response TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_age ON responses (made);
"""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`items` is the input of this turn alone; `previous` names the turn before it."""

    id: str
    previous: str | None
    items: list[dict[str, Any]]
    response: dict[str, Any]


class ResponseStore:
    """May be used from any thread. A damaged file is set aside and a new one begun."""

    def __init__(
        self, path: Path, most_rows: int = 20_000, most_bytes: int = 512 * 1024 * 1024
    ) -> None:
        self._most_rows = most_rows
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(mode=0o600)
            self._db = self._opened(path)
        except (sqlite3.DatabaseError, OSError) as error:
            self._db = self._instead(path, error)
        self._rows, self._bytes = self._db.execute(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM responses"
        ).fetchone()

    def _instead(self, path: Path, error: Exception) -> sqlite3.Connection:
        """A full disk is no reason to throw away what is there, nor to serve nobody."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in DAMAGED:
            log.warning("the response store cannot be opened (%s): memory takes its place", error)
            return self._opened(":memory:")
        aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
        path.replace(aside)
        log.warning("the response store is damaged; it is now %s and a new one is begun", aside)
        path.touch(mode=0o600)
        return self._opened(path)

    @staticmethod
    def _opened(path: Path | str) -> sqlite3.Connection:
        db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.executescript(_TABLE)
        return db

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def put(self, tenant: str, stored: StoredResponse) -> None:
        """Raises sqlite3.Error when it cannot be kept (a full disk)."""
        items, response = json.dumps(stored.items), json.dumps(stored.response)
        size = len(items) + len(response)
        with self._lock:
            self._db.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)",
                (stored.id, tenant, stored.previous, time.time(), size, items, response),
            )
            self._rows += 1
            self._bytes += size
            self._forget()

    def _forget(self) -> None:
        too_old = time.time() - KEPT_SECONDS
        while self._rows:
            row = self._db.execute(
                "SELECT id, made, bytes FROM responses ORDER BY made LIMIT 1"
            ).fetchone()
            is_too_much = self._rows > self._most_rows or self._bytes > self._most_bytes
            if not is_too_much and row[1] >= too_old:
                return
            self._remove(row[0], row[2])

    def _remove(self, response_id: str, size: int) -> None:
        self._db.execute("DELETE FROM responses WHERE id = ?", (response_id,))
        self._rows -= 1
        self._bytes -= size

    def get(self, tenant: str, response_id: str) -> StoredResponse:
        """Raises NotFound."""
        found = self._find(tenant, response_id)
        if found is None:
            raise NotFound(f"There is no response {response_id[:80]!r} here.", param="response_id")
        return found

    def _find(self, tenant: str, response_id: str) -> StoredResponse | None:
        with self._lock:
            row = self._db.execute(
                "SELECT previous, items, response FROM responses WHERE id = ? AND tenant = ?"
                " AND made >= ?",
                (response_id, tenant, time.time() - KEPT_SECONDS),
            ).fetchone()
        if row is None:
            return None
        return StoredResponse(response_id, row[0], json.loads(row[1]), json.loads(row[2]))

    def delete(self, tenant: str, response_id: str) -> None:
        """Raises NotFound."""
        self.get(tenant, response_id)
        with self._lock:
            row = self._db.execute(
                "SELECT bytes FROM responses WHERE id = ?", (response_id,)
            ).fetchone()
            if row is not None:
                self._remove(response_id, row[0])

    def conversation(self, tenant: str, response_id: str) -> list[dict[str, Any]]:
        """All items up to and with a response's output, oldest first. Raises InvalidRequest when
        a turn of it is no longer kept."""
        turns: list[Sequence[dict[str, Any]]] = []
        wanted: str | None = response_id
        while wanted is not None:
            found = self._find(tenant, wanted) if len(turns) < LONGEST_CHAIN else None
            if found is None:
                error = InvalidRequest(
                    f"The previous response {wanted[:80]!r} is not kept here (any more). Send the "
                    "conversation as input.",
                    param="previous_response_id",
                )
                error.code = "previous_response_not_found"
                raise error
            turns.append([*found.items, *found.response["output"]])
            wanted = found.previous
        return [item for turn in reversed(turns) for item in turn]
