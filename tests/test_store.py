"""Stored responses: kept over a restart, per tenant, in bounds, whatever the file looks like."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from serve import store
from serve.errors import InvalidRequest, NotFound
from serve.store import ResponseStore, StoredResponse


def made(name: str, previous: str | None = None, said: str = "x") -> StoredResponse:
    items = [{"type": "message", "id": f"in_{name}"}]
    return StoredResponse(name, previous, items, {"output": [{"id": f"out_{name}", "text": said}]})


def ids(items: list[dict[str, object]]) -> list[object]:
    return [item["id"] for item in items]


def test_a_conversation_is_walked_back_and_survives_a_restart(tmp_path: Path) -> None:
    first = ResponseStore(tmp_path / "r.sqlite3")
    first.put("t", made("a"))
    first.put("t", made("b", "a"))
    first.close()
    again = ResponseStore(tmp_path / "r.sqlite3")
    assert ids(again.conversation("t", "b")) == ["in_a", "out_a", "in_b", "out_b"]
    assert again.get("t", "a") == made("a")
    assert stat.S_IMODE((tmp_path / "r.sqlite3").stat().st_mode) == 0o600
    again.close()


def test_nobody_else_sees_or_deletes_a_response(tmp_path: Path) -> None:
    kept = ResponseStore(tmp_path / "r.sqlite3")
    kept.put("t", made("a"))
    with pytest.raises(NotFound):
        kept.get("u", "a")
    with pytest.raises(NotFound):
        kept.delete("u", "a")
    with pytest.raises(InvalidRequest):
        kept.conversation("u", "a")
    kept.delete("t", "a")
    with pytest.raises(NotFound):
        kept.get("t", "a")
    kept.close()


def test_a_missing_turn_in_the_middle_is_said_not_skipped(tmp_path: Path) -> None:
    kept = ResponseStore(tmp_path / "r.sqlite3")
    kept.put("t", made("a"))
    kept.put("t", made("b", "a"))
    kept.delete("t", "a")
    with pytest.raises(InvalidRequest) as wrong:
        kept.conversation("t", "b")
    assert wrong.value.code == "previous_response_not_found"
    kept.close()


def test_the_oldest_go_when_there_are_too_many_too_large_or_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ResponseStore(tmp_path / "r.sqlite3", most_rows=3, most_bytes=10_000)
    for name in "abcd":
        kept.put("t", made(name))
    with pytest.raises(NotFound):
        kept.get("t", "a")
    kept.put("t", made("big", said="x" * 9_900))
    with pytest.raises(NotFound):
        kept.get("t", "d")
    assert kept.get("t", "big")
    monkeypatch.setattr(store, "KEPT_SECONDS", -1)
    with pytest.raises(NotFound):
        kept.get("t", "big")
    kept.close()


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite3"
    path.write_bytes(b"this is no database, it is a text" * 100)
    kept = ResponseStore(path)
    kept.put("t", made("a"))
    kept.close()
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


def test_a_disk_without_room_leaves_the_file_alone_and_memory_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.sqlite3"
    kept = ResponseStore(path)
    kept.put("t", made("a"))
    kept.close()
    opened = ResponseStore._opened

    def full(place: Path | str) -> sqlite3.Connection:
        if place == path:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return opened(place)

    monkeypatch.setattr(ResponseStore, "_opened", staticmethod(full))
    beside = ResponseStore(path)
    beside.put("t", made("b"))
    assert ids(beside.conversation("t", "b")) == ["in_b", "out_b"]
    beside.close()
    monkeypatch.undo()
    assert ids(ResponseStore(path).conversation("t", "a")) == ["in_a", "out_a"]
