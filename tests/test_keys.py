"""Keys: who is let in as whom, what survives a restart, what the page may show."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import Unauthenticated
from serve.keys import GUEST_SECONDS, KeyRing
from serve.settings import Settings


def ring(folder: Path, **changes: object) -> KeyRing:
    return KeyRing.from_settings(Settings(work_dir=folder, **changes))  # type: ignore[arg-type]


def made_key(folder: Path) -> str:
    return (Settings(work_dir=folder).runtime_dir / "owner_key").read_text()


def test_the_made_key_survives_a_restart_and_only_this_user_may_read_it(tmp_path: Path) -> None:
    ring(tmp_path)
    key = made_key(tmp_path)
    assert ring(tmp_path).identify([key]).is_owner
    assert made_key(tmp_path) == key and len(key) > 40
    for name in ("owner_key", "server_secret"):
        mode = (Settings(work_dir=tmp_path).runtime_dir / name).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600


def test_an_operators_key_is_not_written_anywhere(tmp_path: Path) -> None:
    keys = ring(tmp_path, app_api_key="operators-key")
    assert keys.identify(["operators-key"]).is_owner
    assert all("operators-key" not in file.read_text() for file in keys_files(tmp_path))
    assert "operators-key" not in "".join(keys.announcement("http://x"))


def keys_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_guest_key_opens_for_an_hour_shares_the_pages_budget_and_dies_with_the_process(
    tmp_path: Path,
) -> None:
    keys = ring(tmp_path)
    key = keys.guest_key("192.0.2.1")
    guest = keys.identify([key])
    assert guest.kind == "guest" and not guest.is_owner
    assert guest.bucket == keys.page_identity("192.0.2.1").bucket
    assert guest.bucket != keys.page_identity("192.0.2.2").bucket
    other = keys.identify([keys.guest_key("192.0.2.1")])
    assert other.tenant != guest.tenant, "two visitors share a budget, never a cache"
    assert "192.0.2.1" not in key + guest.tenant + guest.bucket
    with pytest.raises(Unauthenticated, match="new one"):
        ring(tmp_path).identify([key])
    old = keys.guest_key("192.0.2.1", now=1_000_000_000 - GUEST_SECONDS)
    with pytest.raises(Unauthenticated, match="ended"):
        keys.identify([old])


def test_two_sessions_of_the_page_share_a_budget_and_no_cache(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    one, two = keys.page_identity("a", "s1"), keys.page_identity("a", "s2")
    assert one.bucket == two.bucket and one.tenant != two.tenant


@given(st.text(), st.integers(0, 100))
def test_no_text_and_no_cut_or_changed_key_is_let_in(text: str, place: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        keys = ring(Path(folder), app_api_key="operators-key")
        guest = keys.guest_key("a")
        changed = guest[:place] + "x" + guest[place + 1 :]
        for key in (text, "sk-guest-" + text, guest[:place], changed):
            if key not in (guest, "operators-key"):
                with pytest.raises(Unauthenticated):
                    keys.identify([key])


@pytest.mark.parametrize(
    ("changes", "token", "is_local", "kind"),
    [
        ({"host": "127.0.0.1"}, "", True, "owner"),
        ({"host": "127.0.0.1"}, "", False, "guest"),
        ({"host": "0.0.0.0"}, "", True, "guest"),
        ({"host": "0.0.0.0"}, "right", False, "owner"),
        ({"host": "0.0.0.0"}, "wrong", False, "guest"),
        ({"key_display": "owner"}, "", False, "owner"),
        ({"key_display": "guest", "host": "127.0.0.1"}, "", True, "guest"),
        ({"key_display": "off"}, "right", True, "off"),
        ({"app_api_key": "operators-key"}, "", True, "operator"),
        ({"app_api_key": "operators-key", "key_display": "guest"}, "", True, "guest"),
        ({"app_api_key": "operators-key", "key_display": "owner"}, "right", True, "operator"),
    ],
)
def test_what_the_page_may_show(
    tmp_path: Path, changes: dict[str, object], token: str, is_local: bool, kind: str
) -> None:
    keys = ring(tmp_path, **changes)
    offer = keys.offer(keys.owner_token if token == "right" else token, "192.0.2.1", is_local)
    assert offer.kind == kind
    assert (offer.key is not None) == (kind in ("owner", "guest"))
    if offer.key is not None:
        assert keys.identify([offer.key]).is_owner == (kind == "owner")


def test_the_owners_link_is_no_key_and_stays_the_same_after_a_restart(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    assert keys.owner_token == ring(tmp_path).owner_token
    with pytest.raises(Unauthenticated):
        keys.identify([keys.owner_token])
    assert f"#owner={keys.owner_token}" in "".join(keys.announcement("http://127.0.0.1:7860"))
