"""The page in Chromium over a scripted engine: what a reader types, sees, copies and keeps."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Browser, FilePayload, Page, expect
from playwright.sync_api import Error as PlaywrightError

from serve.errors import Overloaded
from serve.values import PassedOver, Progress
from tests.browser import BOX, DRAWN, PHONE, Reader, chromium
from tests.page_server import ANSWERS, PageServer, attach, start

pytestmark = [
    pytest.mark.browser,
    # Gradio's own statistics use an option that pandas has deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

# Seconds; a machine that does other things is slow. bench/page.py measures how fast it is.
AT_ONCE = 5.0

DROP = """(place, text) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([text], "dropped.txt", { type: "text/plain" }));
    const event = { dataTransfer, bubbles: true, cancelable: true };
    place.dispatchEvent(new DragEvent("drop", event));
}"""

FIDELITY = [
    "call __init__ and __main__.py",
    "2*3*4 = 24, a*b*c",
    "<div>tag</div> & <script>alert(1)</script>",
    "$5 and $10",
    "tab\there, two  spaces",
    "中文，测试。😀👩‍👩‍👧",
    r"\(a_b\) \[x\] C:\new\table",
    "# not a heading\n- not a list\n```not code",
    "a ~5 b_c_d `tick` [x](y) ![z](w) |p|",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    running = start(tmp_path_factory.mktemp("page"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def open_page(browser: Browser, server: PageServer) -> Iterator[list[Reader]]:
    """The page that tests share; empty before the first and after one that failed."""
    shared: list[Reader] = []
    yield shared
    for who in shared:
        who.context.close()


@pytest.fixture
def reader(
    browser: Browser, server: PageServer, open_page: list[Reader], request: pytest.FixtureRequest
) -> Iterator[Reader]:
    server.engine.refusal = None
    if open_page:
        open_page[0].begin_again()
    else:
        fresh = Reader(browser, server.url, permissions=["clipboard-read", "clipboard-write"])
        open_page.append(fresh)
        fresh.wait_for_box()
    who = open_page.pop()
    failed = request.session.testsfailed
    yield who
    assert who.errors == []
    if request.session.testsfailed == failed:
        open_page.append(who)
    else:
        who.context.close()


# ---- what is shown and copied is what was written ----


def test_a_question_is_shown_exactly_as_it_was_typed(reader: Reader) -> None:
    for text in FIDELITY:
        reader.ask(text)
        bubble = reader.page.locator(".turn.user .bubble").last
        assert bubble.evaluate("node => node.textContent") == text
        reader.page.locator(".turn.user").last.hover()
        reader.page.locator(".turn.user").last.get_by_label("Copy", exact=True).click()
        expect(reader.page.locator(".turn.user").last.locator("button.icon").first).to_be_visible()
        assert reader.copied() == text


def test_an_answers_signs_are_not_taken_for_markup_and_it_is_copied_exactly(reader: Reader) -> None:
    shown = reader.ask("exact")
    written = ANSWERS["exact"]
    assert shown == written.replace("**", "")
    expect(reader.last.locator("strong")).to_have_text("bold")
    reader.last.get_by_label("Copy", exact=True).click()
    reader.page.wait_for_timeout(100)
    assert reader.copied() == written


def test_code_keeps_its_tabs_is_coloured_and_is_copied_exactly(reader: Reader) -> None:
    reader.ask("code")
    block = reader.last.locator(".code code")
    expect(block.locator(".hljs-keyword").first).to_be_visible()
    source = "def f(x):\n\treturn x * 2  # tab"
    assert block.evaluate("node => node.textContent") == source
    reader.last.locator(".code button").click()
    reader.page.wait_for_timeout(100)
    assert reader.copied() == source


def test_tabs_in_the_code_of_a_list_are_kept(reader: Reader) -> None:
    reader.ask("listed")
    text = "nodes => nodes.map(node => node.textContent)"
    assert reader.last.locator(".code code").evaluate_all(text) == [
        "def f(x):\n\treturn x\t# tab",
        "\tdeep",
    ]
    assert reader.last.locator("li > code").evaluate_all(text) == ["a\tb"]
    expect(reader.last.locator("li li")).to_contain_text("deeper")


def test_every_form_of_formula_is_drawn_and_money_is_not(reader: Reader) -> None:
    reader.ask("maths")
    expect(reader.last.locator(".katex")).to_have_count(5)
    expect(reader.last.locator(".katex-display")).to_have_count(3)
    assert "It costs $5 and $10." in reader.answer()
    expect(reader.last.locator("p > code")).to_have_text(r"\(code\)")


def test_links_are_safe_pictures_of_others_are_not_fetched(reader: Reader) -> None:
    reader.ask("table")
    links = reader.last.locator(".words a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.org",
        "http://x.test/p.png",
    ]
    assert reader.last.locator(".words img").count() == 0
    assert "[bad](javascript:alert(1))" in reader.answer()
    expect(reader.last.locator("td strong")).to_have_text("2")
    expect(reader.last.locator("td").first).to_have_css("overflow-wrap", "break-word")
    foreign = [
        r.url for r in reader.requests if not r.url.startswith((reader.url, "blob:", "data:"))
    ]
    assert foreign == []


# ---- reasoning, tools, queue ----


def test_thoughts_are_open_with_seconds_while_they_come_and_fold_after(reader: Reader) -> None:
    reader.send("think")
    live = reader.page.locator(".thoughts details.live")
    expect(live.locator("summary")).to_have_text(re.compile(r"Thinking… \d+ s"))
    assert live.get_attribute("open") is not None
    reader.wait_for_end()
    folded = reader.last.locator(".thoughts details")
    expect(folded.locator("summary")).to_have_text(re.compile(r"Thought for \d+ s"))
    assert folded.get_attribute("open") is None
    assert "think" not in reader.answer()


def test_thoughts_that_are_opened_to_be_read_stay_in_sight(reader: Reader) -> None:
    reader.page.set_viewport_size({"width": 1280, "height": 300})
    reader.ask("think")
    summary = reader.last.locator(".thoughts summary")
    summary.scroll_into_view_if_needed()
    before = summary.evaluate("node => node.getBoundingClientRect().top")
    summary.click()
    expect(reader.last.locator(".thought")).to_be_visible()
    reader.page.evaluate(DRAWN)
    assert abs(summary.evaluate("node => node.getBoundingClientRect().top") - before) < 20


def test_a_tool_call_is_shown_with_its_name_and_arguments(reader: Reader) -> None:
    reader.ask("tool")
    expect(reader.last.locator(".call summary code")).to_have_text("get_weather")
    assert json.loads(reader.last.locator(".call pre").inner_text()) == {"city": "Paris", "days": 2}


def test_the_place_in_the_queue_is_told(reader: Reader) -> None:
    reader.send("queue")
    expect(reader.last).to_contain_text("2 ahead of you, about 15 s")
    expect(reader.last).to_contain_text("1 ahead of you, about 5 s")
    reader.wait_for_end()
    assert reader.answer() == "Your turn."


def test_the_numbers_of_an_answer_are_shown(reader: Reader) -> None:
    reader.ask("hello")
    pattern = r"[\d.]+ tok/s · \d+ tokens · [\d.]+ s to first"
    assert re.fullmatch(pattern, reader.last.locator(".stats").inner_text())
    expect(reader.page.locator("#context")).to_have_text(re.compile(r"\d+ / 20k"))


# ---- stop, retry, edit, versions ----


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop_ends_the_work_at_once_and_keeps_what_was_said(
    reader: Reader, server: PageServer, way: str
) -> None:
    reader.send("hang")
    expect(reader.last.locator(".words")).to_have_text("And then ")
    began = time.monotonic()
    if way == "Escape":
        reader.page.keyboard.press("Escape")
    else:
        reader.page.locator("#composer .stop-button").click()
    assert server.engine.wait_until_idle(AT_ONCE)
    assert time.monotonic() - began < AT_ONCE
    reader.wait_for_end()
    expect(reader.last).to_contain_text("Stopped.")
    assert reader.answer().strip() == "And then"
    assert reader.ask("hello") == ANSWERS["hello"]


@pytest.mark.parametrize("moment", ["before the server knows", "while the server is told"])
def test_a_stop_that_comes_before_the_answer_stops_the_work_too(
    reader: Reader, server: PageServer, moment: str
) -> None:
    page = reader.page
    page.route("**/queue/join*", lambda route: (time.sleep(0.2), route.continue_()))
    page.fill(BOX, "hang")
    page.press(BOX, "Enter")
    if moment == "while the server is told":
        page.wait_for_function("() => window.chatPage.parts.chat.run.turn")
    page.keyboard.press("Escape")
    reader.wait_for_end()
    page.unroute("**/queue/join*")
    assert server.engine.wait_until_idle(AT_ONCE)
    assert reader.ask("hello") == ANSWERS["hello"]
    assert server.engine.wait_until_idle(AT_ONCE)


def test_an_answer_that_was_stopped_can_go_on(reader: Reader, server: PageServer) -> None:
    reader.send("hang")
    expect(reader.last.locator(".words")).to_have_text("And then ")
    reader.page.keyboard.press("Escape")
    reader.wait_for_end()
    reader.last.get_by_text("Continue").click()
    expect(reader.last.locator(".words")).to_contain_text("You said: And then")
    reader.wait_for_end()
    assert reader.answer().startswith("And then You said")
    assert server.engine.submitted[-1].prompt.ids[-9:] == tuple(b"And then ")


def test_retry_makes_a_version_beside_the_first(reader: Reader) -> None:
    reader.ask("hello")
    reader.last.get_by_label("Retry").press("Enter")
    expect(reader.page.locator("#scroller")).to_be_focused()
    expect(reader.last.locator(".versions")).to_contain_text("2/2")
    reader.wait_for_end()
    reader.last.get_by_label("Previous version").click()
    expect(reader.last.locator(".versions")).to_contain_text("1/2")
    assert reader.page.locator(".turn").count() == 2


def test_an_edited_question_keeps_the_old_one_and_its_answer(reader: Reader) -> None:
    reader.ask("first question")
    reader.ask("second question")
    reader.page.locator(".turn.user").first.hover()
    reader.page.locator(".turn.user").first.get_by_label("Edit").click()
    reader.page.locator(".editor textarea").fill("other question")
    reader.page.keyboard.press("Control+Enter")
    expect(reader.page.locator(".turn")).to_have_count(2)
    reader.wait_for_end()
    assert reader.answer() == "You said: other question"
    reader.page.get_by_label("Previous version").click()
    expect(reader.page.locator(".turn")).to_have_count(4)
    assert reader.answer() == "You said: second question"


def test_while_an_answer_is_written_an_edit_and_a_retry_wait_and_nothing_typed_is_lost(
    reader: Reader,
) -> None:
    page, hint = reader.page, reader.page.locator("#hint")
    reader.ask("hello")
    reader.send("hang")
    expect(reader.last.locator(".words")).to_have_text("And then ")
    page.locator(".turn.assistant").first.get_by_label("Retry").click()
    expect(hint).to_have_text("An answer is being written. Esc stops it.")
    page.locator(".turn.user").first.get_by_label("Edit").click()
    page.locator(".editor textarea").fill("said otherwise")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".editor")).to_have_count(1)
    page.locator("#composer .stop-button").click()
    reader.wait_for_end()
    expect(page.locator(".editor textarea")).to_have_value("said otherwise")
    page.locator(".editor .primary").click()
    expect(page.locator("#scroller")).to_be_focused()
    expect(page.locator(".turn")).to_have_count(2)
    reader.wait_for_end()
    assert reader.answer() == "You said: said otherwise"


def test_arrow_up_in_an_empty_box_edits_the_last_question(reader: Reader) -> None:
    reader.ask("hello")
    reader.page.focus(BOX)
    reader.page.keyboard.press("ArrowUp")
    expect(reader.page.locator(".editor textarea")).to_be_focused()
    reader.page.keyboard.press("Escape")
    expect(reader.page.locator(".editor")).to_have_count(0)


def test_the_model_is_given_the_whole_conversation_and_the_system_prompt(
    reader: Reader, server: PageServer
) -> None:
    reader.page.click("#open-sidebar")
    reader.page.click("#tab-settings")
    reader.page.fill("#set-system", "Be brief.")
    reader.page.fill("#set-max_tokens", "500")
    reader.page.select_option("#effort-choice", "high")
    reader.ask("hello")
    reader.ask("again")
    last = server.engine.submitted[-1]
    said = bytes(last.prompt.ids).decode().split("\x1e")
    assert said == ["system: Be brief.", "hello", ANSWERS["hello"], "again"]
    assert last.sampling.max_tokens == 500


# ---- the box ----


def test_shift_enter_makes_a_line_and_an_input_methods_enter_does_not_send(reader: Reader) -> None:
    reader.page.fill(BOX, "one")
    reader.page.press(BOX, "Shift+Enter")
    reader.page.type(BOX, "two")
    assert reader.page.input_value(BOX) == "one\ntwo"
    session = reader.context.new_cdp_session(reader.page)
    session.send(
        "Input.imeSetComposition", {"text": "你好", "selectionStart": 2, "selectionEnd": 2}
    )
    session.send("Input.insertText", {"text": "你好"})
    assert reader.page.input_value(BOX) == "one\ntwo你好"
    assert reader.page.locator(".turn").count() == 0


def test_while_an_answer_is_written_the_next_message_can_be_typed_but_not_lost(
    reader: Reader,
) -> None:
    reader.send("hang")
    expect(reader.last.locator(".words")).to_have_text("And then ")
    reader.page.type(BOX, "next")
    reader.page.press(BOX, "Enter")
    assert reader.page.input_value(BOX) == "next"
    expect(reader.page.locator("#hint")).to_have_text("An answer is being written. Esc stops it.")
    reader.page.keyboard.press("Escape")
    reader.wait_for_end()
    assert reader.page.input_value(BOX) == "next"


def test_a_draft_survives_a_reload_and_a_long_paste_stays_text(reader: Reader) -> None:
    long = "line of text\n" * 400
    reader.page.evaluate("text => navigator.clipboard.writeText(text)", long)
    reader.page.focus(BOX)
    reader.page.keyboard.press("Control+v")
    expect(reader.page.locator(BOX)).to_have_value(long)
    reader.page.wait_for_timeout(300)
    reader.reload()
    expect(reader.page.locator(BOX)).to_have_value(long)


def test_on_a_touch_screen_enter_is_a_new_line(browser: Browser, server: PageServer) -> None:
    with Reader(browser, server.url, viewport=PHONE, has_touch=True, is_mobile=True) as who:
        who.page.fill(BOX, "one")
        who.page.press(BOX, "Enter")
        who.page.type(BOX, "two")
        assert who.page.input_value(BOX) == "one\ntwo"
        who.page.locator("#composer .submit-button").tap()
        who.wait_for_end()
        assert who.answer().startswith("You said: one")


def test_files_are_read_as_text_and_a_picture_is_not_in_the_way(
    reader: Reader, tmp_path: Path
) -> None:
    note = tmp_path / "note.txt"
    note.write_text("the secret word is plum")
    picture = Path(__file__).parent.parent / "assets" / "favicon.png"
    reader.page.set_input_files("#composer input[type=file]", [str(note), str(picture)])
    expect(reader.page.locator("#dock-notices")).to_contain_text("cannot see images")
    reader.page.locator("#scroller").evaluate(DROP, "the other word is pear")  # beside the box
    names = ["note.txt", "favicon.png", "dropped.txt"]
    for i, name in enumerate(names):
        button = reader.page.locator("#composer .delete-button").nth(i)
        expect(button).to_have_accessible_name(f"Remove “{name}”")
        expect(button).to_have_css("opacity", "1")  # a finger does not hover
    answer = reader.ask("what is it?")
    assert "the secret word is plum" in answer and "what is it?" in answer
    assert "the other word is pear" in answer
    expect(reader.last.locator(".note")).to_contain_text("Image not used")
    expect(reader.page.locator(".turn.user img.picture")).to_be_visible()
    reader.page.set_input_files("#composer input[type=file]", str(picture))  # once more the same
    expect(reader.page.locator("#composer .thumbnail-item img")).to_be_visible()
    reader.reload()
    image = reader.page.locator(".turn.user img.picture")
    expect(image).to_be_visible()
    image.evaluate("node => node.decode()")
    assert image.evaluate("node => node.naturalWidth") == 64


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("scene", "words"),
    [
        ("begin", "The model failed on this request."),
        ("middle", "The model failed on this request."),
        ("memory", "The model ran out of memory."),
        ("full", "Too many people are using the model right now."),
        ("long", "The conversation is longer than the model can read."),
        ("settings", "The request was not accepted."),
    ],
)
def test_after_every_failure_there_is_a_message_and_one_can_type_at_once(
    reader: Reader, server: PageServer, scene: str, words: str
) -> None:
    if scene == "full":
        server.engine.refusal = Overloaded("Too many requests are waiting.", retry_after=2)
    if scene == "settings":
        reader.page.evaluate("() => window.chatPage.parts.settings.set('temperature', 7)")
    reader.send("x" * 30000 if scene == "long" else scene)
    expect(reader.last.locator(".error strong")).to_have_text(words)
    began = time.monotonic()
    server.engine.refusal = None
    reader.page.evaluate("() => window.chatPage.parts.settings.reset()")
    if scene == "middle":
        assert "This begins well, but" in reader.answer()
    else:
        expect(reader.page.locator(BOX)).to_have_value(re.compile("."))  # it is given back
    reader.page.fill(BOX, "I can type")
    assert time.monotonic() - began < AT_ONCE
    assert reader.page.input_value(BOX) == "I can type"
    reader.send("hello")
    expect(reader.last.locator(".words")).to_have_text(ANSWERS["hello"])


def test_a_failed_answer_can_be_retried(reader: Reader, server: PageServer) -> None:
    server.engine.refusal = Overloaded("Too many requests are waiting.", retry_after=2)
    reader.send("hello")
    expect(reader.last.locator(".error")).to_be_visible()
    server.engine.refusal = None
    expect(reader.page.locator(BOX)).to_have_value("hello")
    reader.last.get_by_text("Retry", exact=True).click()
    expect(reader.last.locator(".words")).to_have_text(ANSWERS["hello"])
    expect(reader.page.locator(BOX)).to_have_value("")


def test_the_server_is_restarted_and_the_conversation_goes_on(
    browser: Browser, tmp_path: Path
) -> None:
    first = start(tmp_path)
    with Reader(browser, first.url) as who:
        who.ask("hello")
        who.send("hang")
        expect(who.last.locator(".words")).to_have_text("And then ")
        first.close()
        expect(who.last.locator(".error")).to_contain_text("lost", timeout=30000)
        who.page.fill(BOX, "a thought meanwhile")
        expect(who.page.locator("#state-words")).to_have_text("No connection", timeout=30000)
        second = start(tmp_path, port=first.port)
        expect(who.page.locator("#state-words")).to_have_text("Ready", timeout=30000)
        who.wait_for_box()
        expect(who.page.locator(BOX)).to_have_value("a thought meanwhile")
        assert who.ask("once more").startswith("You said")
        said = bytes(second.engine.submitted[-1].prompt.ids).decode().split("\x1e")
        assert said == ["hello", ANSWERS["hello"], "hang", "And then ", "once more"]
        second.close()


def test_a_conversation_that_is_too_long_goes_on_from_where_it_still_fits(
    reader: Reader, server: PageServer
) -> None:
    for i in range(3):
        reader.ask(f"part {i} " + "x" * 2500)
    reader.ask("last words")
    reader.send("and now? " + "y" * 8000)
    box = reader.last.locator(".error")
    expect(box).to_contain_text("The conversation is longer than the model can read.")
    box.get_by_role("button", name="Answer from the last 3 messages").click()
    reader.wait_for_end()
    assert reader.answer().startswith("You said: and now?")
    expect(reader.page.locator(".cut-line")).to_contain_text("The first 6 messages no longer fit")
    below = reader.page.locator(".cut-line + .turn .bubble")
    expect(below).to_have_text("last words")
    reader.ask("more")  # it stays so, also after a reload and for a server that knows nothing
    reader.reload()
    reader.ask("and more")
    said = bytes(server.engine.submitted[-1].prompt.ids).decode().split("\x1e")
    assert said[0] == "last words" and said[-3:] == ["more", "You said: more", "and more"]


def test_one_message_that_is_too_long_alone_comes_with_no_such_offer(reader: Reader) -> None:
    reader.ask("x" * 2500)
    reader.send("z" * 30000)
    expect(reader.last.locator(".error")).to_be_visible()
    assert reader.last.locator(".error button").count() == 0
    bubble = reader.page.locator(".bubble").last  # it does not push all else out of sight
    expect(bubble).to_have_attribute("tabindex", "0")
    assert bubble.evaluate("node => node.clientHeight < Math.min(innerHeight, node.scrollHeight)")


# ---- conversations in the browser ----


def test_conversations_are_listed_found_renamed_and_deleted(reader: Reader) -> None:
    page = reader.page
    reader.ask("apples and pears")
    page.click("#new-chat")
    reader.ask("bread and butter")
    page.click("#open-sidebar")
    names = page.locator("#chat-list .open")
    expect(names).to_have_text(["bread and butter", "apples and pears"])
    page.fill("#find", "PEARS")
    expect(names).to_have_text(["apples and pears"])
    page.get_by_label("Rename “apples and pears”").click()
    page.keyboard.type("fruit")
    page.keyboard.press("Enter")
    page.fill("#find", "")
    expect(names).to_have_text(["bread and butter", "fruit"])
    names.nth(1).click()
    expect(page.locator(".bubble")).to_have_text(["apples and pears"])
    page.get_by_label("Delete “fruit”").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(names).to_have_text(["bread and butter"])
    expect(page.locator(".turn")).to_have_count(0)


def test_an_export_can_be_imported_elsewhere(
    reader: Reader, browser: Browser, server: PageServer, tmp_path: Path
) -> None:
    reader.ask("hello")
    reader.page.click("#open-sidebar")
    with reader.page.expect_download() as download:
        reader.page.get_by_text("Export all").click()
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    with Reader(browser, server.url) as other:
        other.page.click("#open-sidebar")
        other.page.set_input_files("#panel-chats input[type=file]", str(file))
        expect(other.page.locator("#chats-note")).to_have_text("1 imported.")
        other.page.locator("#chat-list .open").click()
        assert other.answer() == ANSWERS["hello"]
        chats = json.loads(file.read_text())
        question, answer = chats["conversations"][0]["nodes"].values()
        for broken in ({"format": "something else"}, chats):
            question["parent"] = answer["id"]  # a circle: no beginning would ever be found
            other.page.set_input_files("#panel-chats input[type=file]", as_json(broken))
            expect(other.page.locator("#chats-note")).to_contain_text("not an export")
        question["parent"] = ""
        answer |= {"stats": {"tokens_per_second": "fast"}, "files": [7], "state": ["?"]}
        other.page.set_input_files("#panel-chats input[type=file]", as_json(chats))
        expect(other.page.locator("#chats-note")).to_have_text("1 imported.")
        other.reload()
        assert other.answer() == ANSWERS["hello"] and other.errors == []


def as_json(value: object) -> FilePayload:
    data = json.dumps(value).encode()
    return {"name": "chats.json", "mimeType": "application/json", "buffer": data}


def test_what_another_tab_has_said_in_the_same_conversation_is_kept(reader: Reader) -> None:
    reader.ask("hello")
    reader.page.evaluate("""async () => {
        const { store, chat } = window.chatPage.parts;
        const tab = await store.constructor.open();
        const there = await tab.get(chat.conversation.id);
        there.nodes.other = { id: "other", parent: there.leaf, role: "user", text: "in the other",
            state: "done", time: Date.now() };
        there.nodes[there.leaf].text += " And more.";
        await tab.put({ ...there, leaf: "other" });
    }""")
    reader.ask("in this one")
    nodes = reader.stored()[0]["nodes"].values()
    assert [node["text"] for node in sorted(nodes, key=lambda node: node["time"])] == [
        "hello",
        ANSWERS["hello"] + " And more.",
        "in the other",
        "in this one",
        "You said: in this one",
    ]
    expect(reader.page.locator(".turn.user").last.locator(".versions")).to_contain_text("2/2")


@contextmanager
def another_tab(reader: Reader) -> Iterator[Page]:
    """The same browser's, at the conversation that was open last."""
    tab = reader.context.new_page()
    tab.goto(reader.url)
    tab.wait_for_selector(BOX, timeout=60000)
    yield tab
    tab.close()


def test_an_answer_that_another_tab_writes_is_shown_as_it_grows_and_once_it_is_there(
    reader: Reader,
) -> None:
    reader.send("slow")
    expect(reader.last.locator(".words")).to_contain_text("word")
    with another_tab(reader) as tab:
        answer = tab.locator(".turn.assistant").last
        expect(answer.locator(".notes")).to_have_text("Being answered in another tab.")
        expect(answer.locator(".words")).to_contain_text("word word word")
        tab.fill(BOX, "hello")
        tab.press(BOX, "Enter")
        expect(tab.locator("#hint")).to_have_text("Being answered in another tab.")
        expect(tab.locator(BOX)).to_have_value("hello")
        reader.wait_for_end(30)
        expect(answer.locator(".words")).to_have_text(ANSWERS["slow"].strip())
        expect(answer.locator(".notes")).to_have_text("")
        expect(answer.get_by_role("button", name="Copy")).to_be_visible()
        tab.press(BOX, "Enter")
        for place in (tab, reader.page):  # who stood at the end goes along
            expect(place.locator(".turn.assistant")).to_have_count(2)
            expect(place.locator(".turn.assistant .words").last).to_have_text(ANSWERS["hello"])


@pytest.mark.parametrize("end", ["closed", "crashed"])
def test_an_answer_whose_tab_is_gone_was_stopped(
    reader: Reader, server: PageServer, end: str
) -> None:
    reader.ask("hello")
    with another_tab(reader) as tab:
        tab.fill(BOX, "hang")
        tab.press(BOX, "Enter")
        expect(reader.last.locator(".words")).to_have_text("And then ")
        expect(reader.last.locator(".notes")).to_have_text("Being answered in another tab.")
        if end == "closed":
            tab.close()
        else:
            with suppress(PlaywrightError):
                tab.goto("chrome://crash", timeout=5000)
        expect(reader.last.locator(".notes")).to_have_text("Stopped.")
        expect(reader.last.locator(".words")).to_have_text("And then ")
    assert server.engine.wait_until_idle(15)
    assert reader.ask("exact") == ANSWERS["exact"].replace("**", "")


def test_a_reload_while_an_answer_is_written_keeps_what_there_was(
    reader: Reader, server: PageServer
) -> None:
    reader.send("hang")
    expect(reader.last.locator(".words")).to_have_text("And then ")
    reader.reload()
    expect(reader.last).to_contain_text("And then")
    expect(reader.last).to_contain_text("Stopped.")
    assert server.engine.wait_until_idle(15)


def test_another_conversation_can_be_read_while_an_answer_is_written(reader: Reader) -> None:
    reader.ask("hello")
    reader.page.click("#new-chat")
    reader.send("slow")
    expect(reader.last.locator(".words")).to_contain_text("word")
    reader.page.click("#open-sidebar")
    reader.page.locator("#chat-list .open").nth(1).click()
    expect(reader.last.locator(".words")).to_have_text(ANSWERS["hello"])
    reader.page.locator("#chat-list .open").nth(0).click()
    reader.wait_for_end(30)
    assert reader.answer().strip() == ANSWERS["slow"].strip()


# ---- the model's state ----


def test_who_comes_while_the_model_loads_sees_how_far_it_is_and_may_already_send(
    browser: Browser, tmp_path: Path
) -> None:
    server = start(tmp_path, is_ready=False)
    server.service.report(
        Progress(
            "downloading", "openai/gpt-oss-20b", "hub", 7_900_000_000, 13_800_000_000, 84e6, 70
        )
    )
    with Reader(browser, server.url) as who:
        state, far = who.page.locator("#state-words"), who.page.locator("#banner label")
        expect(state).to_have_text("Downloading…")
        expect(far).to_have_text("Downloading 7.9 GB of 13.8 GB · 84 MB/s · about 70 s left")
        expect(who.page.locator("#banner progress")).to_be_visible()
        expect(who.page.locator("#banner")).to_have_role("group")  # not read out each second
        who.send("hello")
        expect(who.last).to_contain_text("Will be sent when the model is ready.")
        server.service.report(Progress("downloading", "m", "hub", 8, 13, 0.0, None, 12.0, 2))
        expect(far).to_have_text("No data for 12 s, trying again (2)")
        server.service.report(Progress("downloading", "m", "hub", 3_000_000))
        expect(far).to_have_text("Downloading, 3.0 MB so far")
        server.service.report(Progress("loading", "m", "", 5_000_000_000, 13_800_000_000))
        expect(far).to_have_text("Loading weights: 5.0 GB of 13.8 GB")
        server.service.report(Progress("loading"))
        expect(state).to_have_text("Loading weights…")
        expect(who.page.locator("#banner")).to_be_hidden()
        attach(server.service, server.engine)
        who.wait_for_end()
        assert who.answer() == ANSWERS["hello"]
        expect(state).to_have_text("Ready")
    server.close()


def test_a_model_that_could_not_be_loaded_is_told_with_the_reasons(
    browser: Browser, tmp_path: Path
) -> None:
    server = start(tmp_path, is_ready=False)
    server.service.pass_over(
        PassedOver("big/model", "needs 40 GB, 8 GB are free", "Set MODEL_IDS.")
    )
    server.service.report(Progress("failed", detail="No candidate fits this machine."))
    with Reader(browser, server.url) as who:
        expect(who.page.locator("#banner")).to_contain_text("No model could be loaded.")
        expect(who.page.locator("#model-name")).to_have_text("scripted/demo")
        expect(who.page.locator("#banner")).to_contain_text("No candidate fits this machine.")
        who.page.locator("#banner summary").click()
        expect(who.page.locator("#banner li")).to_contain_text("needs 40 GB, 8 GB are free")
        who.send("hello")
        expect(who.last.locator(".error")).to_contain_text("The model does not answer now.")
    server.close()


# ---- language, theme, keyboard ----


def test_the_page_speaks_the_browsers_language_and_the_switch_changes_it_in_place(
    browser: Browser, server: PageServer
) -> None:
    with Reader(browser, server.url, locale="zh-CN") as who:
        assert who.page.locator("html").get_attribute("lang") == "zh-CN"
        expect(who.page.locator(BOX)).to_have_attribute("placeholder", "请输入问题…")
        who.ask("hello")
        expect(who.last.get_by_label("重试")).to_be_visible()
        who.page.click("#language")
        expect(who.last.get_by_label("Retry")).to_be_visible()
        expect(who.page.locator(BOX)).to_have_attribute("placeholder", "Ask anything…")
        who.reload()
        expect(who.page.locator(BOX)).to_have_attribute("placeholder", "Ask anything…")


def test_the_theme_follows_the_system_until_one_is_chosen(
    browser: Browser, server: PageServer
) -> None:
    with Reader(browser, server.url, color_scheme="dark") as who:
        root = who.page.locator("html")
        expect(root).to_have_attribute("data-theme", "dark")
        who.page.click("#theme")
        expect(root).to_have_attribute("data-theme", "light")
        who.reload()
        expect(root).to_have_attribute("data-theme", "light")
        assert not who.page.evaluate("() => document.body.classList.contains('dark')")


def test_the_keyboard_alone_reaches_everything(reader: Reader) -> None:
    page = reader.page
    reader.ask("hello")
    page.keyboard.press("Shift+Tab")
    seen: set[str] = set()
    focused = "() => { const n = document.activeElement; return n.id || n.ariaLabel || ''; }"
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        seen.add(page.evaluate(focused))
    assert {"Copy", "Retry", "Edit", "open-sidebar", "new-chat", "open-api", "theme"} <= seen
    page.focus("#open-sidebar")
    page.keyboard.press("Enter")
    expect(page.locator("#tab-chats")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel-api")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#open-sidebar")).to_be_focused()


def test_a_screen_reader_hears_that_the_answer_is_ready_not_its_tokens(reader: Reader) -> None:
    assert reader.page.locator("#transcript").get_attribute("aria-live") == "off"
    reader.ask("hello")
    expect(reader.page.locator("#spoken")).to_have_text("Answer ready, 5 words.")
    assert reader.page.locator("#spoken").get_attribute("aria-live") == "polite"


def test_the_page_follows_the_answer_only_while_the_reader_is_at_its_end(reader: Reader) -> None:
    reader.page.set_viewport_size({"width": 700, "height": 400})
    scroller = reader.page.locator("#scroller")
    reader.ask("maths")
    reader.send("slow")
    expect(reader.last.locator(".words")).to_contain_text("word word word")
    reader.page.mouse.move(350, 200)
    reader.page.mouse.wheel(0, -150)
    reader.page.wait_for_timeout(300)
    top = scroller.evaluate("node => node.scrollTop")
    reader.page.wait_for_timeout(800)
    assert scroller.evaluate("node => node.scrollTop") == top
    reader.page.click("#newest")
    reader.wait_for_end(30)
    distance = "node => node.scrollHeight - node.scrollTop - node.clientHeight"
    assert scroller.evaluate(distance) < 5


def test_the_end_of_an_answer_is_in_view_on_a_phone(browser: Browser, server: PageServer) -> None:
    with Reader(browser, server.url, viewport=PHONE) as who:
        for scene in ("hello", "maths", "code", "table"):
            who.ask(scene)
            who.page.wait_for_timeout(300)
            row = who.last.locator(".actions").bounding_box()
            dock = who.page.locator("#dock").bounding_box()
            assert row is not None and dock is not None
            assert row["y"] + row["height"] <= dock["y"] + 1, scene


def test_a_phone_shows_the_conversation_and_the_box_without_scrolling_sideways(
    browser: Browser, server: PageServer
) -> None:
    with Reader(browser, server.url, viewport=PHONE) as who:
        who.ask("code")
        who.ask("table")
        assert who.page.evaluate("() => document.documentElement.scrollWidth") == 360
        for part in ("#scroller", "#dock", ".top"):
            assert who.page.locator(part).evaluate("node => node.scrollWidth") <= 360
        who.ask("wide")  # its table scrolls instead, and its numbers stay in one piece
        cell = who.last.locator("td", has_text="1 000 000 %")
        assert who.last.locator(".table").evaluate("node => node.scrollWidth") > 360
        lines = "node => { const r = new Range(); r.selectNodeContents(node);"
        assert cell.evaluate(lines + " return r.getClientRects().length; }") == 1
        box = who.page.locator(BOX).bounding_box()
        assert box is not None and box["y"] + box["height"] <= 740
        who.page.click("#open-sidebar")
        sheet = who.page.locator("#sidebar").bounding_box()
        assert sheet is not None and sheet["width"] == 360
        who.page.click("#close-sidebar")
        expect(who.page.locator("#sidebar")).to_be_hidden()


def test_on_a_phone_effort_context_and_files_are_in_the_clips_menu(
    browser: Browser, server: PageServer
) -> None:
    with Reader(browser, server.url, viewport=PHONE) as who:
        page = who.page
        who.ask("hello")
        expect(page.locator("#effort")).to_be_hidden()
        page.click("#composer .upload-button")
        expect(page.locator("#context")).to_have_text(re.compile(r"Context\d+ / 20k"))
        page.select_option("#effort-choice", "high")
        with page.expect_file_chooser() as chooser:
            page.click("#clip-attach")
        chooser.value.set_files(str(Path(__file__)))
        expect(page.locator("#composer .thumbnails")).to_be_visible()
        expect(page.locator("#clip-menu")).to_be_hidden()
        page.click("#composer .upload-button >> nth=0")
        page.keyboard.press("Escape")
        expect(page.locator("#clip-menu")).to_be_hidden()
        page.set_viewport_size({"width": 1280, "height": 800})
        expect(page.locator("#dock-tools #effort-choice")).to_have_value("high")


def test_on_a_phone_theme_and_language_are_under_settings(
    browser: Browser, server: PageServer
) -> None:
    with Reader(browser, server.url, viewport=PHONE, color_scheme="light") as who:
        who.page.click("#open-sidebar")
        who.page.click("#tab-settings")
        who.page.select_option("#set-theme", "dark")
        expect(who.page.locator("html")).to_have_attribute("data-theme", "dark")
        who.page.select_option("#set-language", "zh-CN")
        expect(who.page.locator("#tab-settings")).to_have_text("设置")
        top = who.page.evaluate("() => document.elementFromPoint(180, 700).closest('#sidebar')?.id")
        assert top == "sidebar"


def test_what_is_not_set_is_left_to_the_models_makers(reader: Reader, server: PageServer) -> None:
    reader.ask("hello")
    options = reader.page.evaluate("() => window.chatPage.parts.settings.options()")
    assert options["temperature"] is None and options["top_p"] is None
    reader.page.click("#open-sidebar")
    reader.page.click("#tab-settings")
    reader.page.locator("#set-temperature").fill("0.3")
    reader.ask("hello")
    assert server.engine.submitted[-1].sampling.temperature == 0.3
