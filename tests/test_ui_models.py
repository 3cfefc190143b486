"""Several models: choosing one in the header changes what serves, for everybody who looks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import BOX, PHONE, Reader, chromium
from tests.page_server import ANSWERS, PageServer, offer, start

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

PICTURE = str(Path(__file__).parent.parent / "assets" / "favicon.png")
BLIND, SEEING, MAYBE, BROKEN = "scripted/demo", "scripted/eyes", "scripted/maybe", "its/broken"
MODELS = {BLIND: False, SEEING: True, MAYBE: None, BROKEN: False}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    settings = {"key_display": "guest"}
    running = start(tmp_path_factory.mktemp("page"), settings=settings)
    offer(running, MODELS)
    yield running
    running.close()


@pytest.fixture
def owner(browser: Browser, server: PageServer) -> Iterator[Reader]:
    """By the owner's link; the model that cannot see serves."""
    with Reader(browser, f"{server.url}#owner={server.keys.owner_token}") as who:
        choose(who, BLIND, "text only")
        yield who
        assert who.errors == []


def choose(who: Reader, model: str, badge: str) -> None:
    who.page.select_option("#model-choice", model)
    expect(who.page.locator("#state-words")).to_have_text("Ready")
    expect(who.page.locator("#model-choice")).to_have_value(model)
    expect(who.page.locator("#model-badge")).to_have_text(badge)


def test_choosing_a_model_changes_what_serves_and_what_the_badge_says(
    owner: Reader, server: PageServer
) -> None:
    choose(owner, SEEING, "sees images")
    assert server.service.models()[0].id == SEEING
    owner.ask("hello")
    choose(owner, MAYBE, "images: unknown")
    choose(owner, BLIND, "text only")
    assert owner.ask("hello") == ANSWERS["hello"]
    names = [node["model"] for node in owner.stored()[0]["nodes"].values() if "model" in node]
    assert names == [SEEING, BLIND]


def test_a_picture_for_a_blind_model_comes_with_the_offer_of_one_that_sees_and_stays(
    owner: Reader, server: PageServer
) -> None:
    page = owner.page
    page.set_input_files("#composer input[type=file]", PICTURE)
    page.fill(BOX, "what is it?")
    notice = page.locator("#dock-notices")
    expect(notice).to_contain_text(f"{BLIND} cannot see images – it will get your text only.")
    notice.get_by_role("button", name=f"Switch to {SEEING}").click()
    expect(page.locator("#model-badge")).to_have_text("sees images")
    expect(notice).to_be_empty()
    expect(page.locator("#composer .thumbnail-item img")).to_have_count(1)
    assert page.input_value(BOX) == "what is it?"
    page.press(BOX, "Enter")
    owner.wait_for_end()
    assert owner.last.locator(".note").count() == 0
    assert server.service.models()[0].id == SEEING


def test_who_else_looks_sees_the_switch_and_a_message_sent_meanwhile_is_answered_by_the_new_one(
    owner: Reader, browser: Browser, server: PageServer
) -> None:
    with Reader(browser, server.url) as other:
        expect(other.page.locator("#model-choice")).to_have_value(BLIND)
        owner.page.select_option("#model-choice", SEEING)
        expect(owner.page.locator("#shell")).not_to_have_attribute("data-state", "ready")
        assert owner.ask("hello") == ANSWERS["hello"]
        assert server.service.models()[0].id == SEEING
        expect(other.page.locator("#model-choice")).to_have_value(SEEING)
        expect(other.page.locator("#model-badge")).to_have_text("sees images")


def test_who_may_not_switch_is_told_so_and_the_chooser_shows_what_serves(
    browser: Browser, server: PageServer, owner: Reader
) -> None:
    with Reader(browser, server.url) as guest:
        guest.page.select_option("#model-choice", SEEING)
        told = guest.page.locator("#dock-notices")
        expect(told).to_contain_text("This is for the owner of this server.")
        expect(guest.page.locator("#model-choice")).to_have_value(BLIND)
        assert server.service.models()[0].id == BLIND


def test_after_a_model_that_cannot_be_loaded_everything_is_tried_again(
    owner: Reader, server: PageServer
) -> None:
    page = owner.page
    page.select_option("#model-choice", BROKEN)
    expect(page.locator("#banner")).to_contain_text("No model could be loaded.")
    expect(page.locator("#model-choice option:checked")).to_have_text("Choose a model")
    page.fill(BOX, "still here")
    page.click("#try-again")
    expect(page.locator("#state-words")).to_have_text("Ready")
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#model-choice")).to_have_value(BLIND)
    assert page.input_value(BOX) == "still here"


def test_another_model_can_be_chosen_where_one_failed(owner: Reader) -> None:
    owner.page.select_option("#model-choice", BROKEN)
    expect(owner.page.locator("#banner")).to_contain_text("No model could be loaded.")
    choose(owner, SEEING, "sees images")


def test_the_chooser_fits_on_a_phone(browser: Browser, server: PageServer) -> None:
    with Reader(browser, server.url, viewport=PHONE) as who:
        expect(who.page.locator("#model-choice")).to_be_visible()
        assert who.page.evaluate("() => document.documentElement.scrollWidth") == 360
        for name in ("#model-choice", "#new-chat", "#open-api"):
            box = who.page.locator(name).bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360, name
        assert who.page.locator("#open-api").evaluate(
            "node => node.scrollWidth <= node.clientWidth"
        )
