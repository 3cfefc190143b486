"""A turn of the page: what the model is given, what is remembered, what goes wrong as a message."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from serve.engine.scripted import Say, ScriptedEngine
from serve.errors import EngineFailed, Unsupported
from serve.service import ServedModel, Service
from serve.ui.chat import run_turn
from serve.ui.memory import MAX_WEIGHT, Memory, Node
from serve.ui.visit import Visit
from serve.values import Capabilities, ChatRequest, ModelCard, Progress, TextPart
from tests.text_format import BETWEEN, END, TextFormat, encoded

PICTURE = (Path(__file__).parent.parent / "assets" / "favicon.png").read_bytes()


class Watched(TextFormat):
    """Keeps the requests it renders; refuses pictures when told to."""

    def __init__(self, refuses_pictures: bool = False) -> None:
        self.requests: list[ChatRequest] = []
        self.refuses_pictures = refuses_pictures

    def render(self, request: ChatRequest) -> Any:
        self.requests.append(request)
        if self.refuses_pictures and any(m.images for m in request.messages):
            raise Unsupported("This model takes no pictures.", param="messages")
        return super().render(request)


class Stand:
    """A service over a scripted engine that says "Fine."; `turn` runs one and returns snapshots."""

    def __init__(self, vision: bool | None = None, refuses_pictures: bool = False) -> None:
        self.format = Watched(refuses_pictures)
        self.engine = ScriptedEngine([Say(encoded("Fine.")), END], eos_ids={END})
        self.service = Service("m")
        self.vision = vision
        self.memory = Memory()

    def attach(self, name: str = "m") -> None:
        card = ModelCard(name, 4096, Capabilities(self.vision, True, True, ("low", "high")))
        self.service.attach(ServedModel(card, self.format, self.engine))

    def turn(
        self, files: list[str] | None = None, visit: Visit | None = None, **given: Any
    ) -> list[dict[str, Any]]:
        async def run() -> list[dict[str, Any]]:
            turn = {"answer": "a1", "question": "q1", "options": {}, "history": [], **given}
            news = run_turn(self.service, self.memory, turn, files or [], visit)
            return [snapshot async for snapshot in news]

        return asyncio.run(run())

    @property
    def given(self) -> list[str]:
        return bytes(self.engine.submitted[-1].prompt.ids).decode().split(BETWEEN)


@pytest.fixture
def stand() -> Stand:
    made = Stand()
    made.attach()
    return made


def test_a_turn_is_answered_and_the_next_needs_only_its_own_text(stand: Stand) -> None:
    first = stand.turn(text="one", parent="")[-1]
    assert (first["phase"], first["text"], first["turn"]) == ("done", "Fine.", "a1")
    stand.turn(answer="a2", question="q2", parent="a1", text="two")
    assert stand.given == ["one", "Fine.", "two"]


def test_a_sibling_does_not_see_its_sibling(stand: Stand) -> None:
    stand.turn(text="one", parent="")
    stand.turn(answer="b1", question="p1", parent="", text="other")
    assert stand.given == ["other"]


def test_a_server_that_remembers_nothing_asks_for_the_conversation_and_then_answers(
    stand: Stand,
) -> None:
    asked = {"answer": "a2", "question": "q2", "parent": "a1", "text": "two"}
    assert stand.turn(**asked) == [{"turn": "a2", "phase": "need_history"}]
    history = [
        {"id": "q1", "parent": "", "role": "user", "text": "one", "files": []},
        {"id": "a1", "parent": "q1", "role": "assistant", "text": "Fine.", "files": []},
    ]
    assert stand.turn(**asked, history=history)[-1]["phase"] == "done"
    assert stand.given == ["one", "Fine.", "two"]


def test_a_retry_names_the_question_only(stand: Stand) -> None:
    stand.turn(text="one", parent="")
    assert stand.turn(answer="a2")[-1]["phase"] == "done"
    assert stand.given == ["one"]


def test_an_answer_goes_on_after_what_it_had(stand: Stand) -> None:
    stand.turn(text="one", parent="")
    last = stand.turn(answer="a1", continues="Once upon ")[-1]
    assert last["text"] == "Once upon Fine."
    assert stand.given == ["one", "Once upon "]
    assert stand.format.requests[-1].continue_final_message


def test_options_reach_the_request(stand: Stand) -> None:
    options = {"system": "Be brief.", "temperature": 0.3, "top_p": 0.5, "max_tokens": 7}
    stand.turn(text="one", options={**options, "effort": "low"})
    request = stand.format.requests[-1]
    assert request.sampling.temperature == 0.3 and request.sampling.top_p == 0.5
    assert request.sampling.max_tokens == 7 and request.reasoning_effort == "low"
    assert stand.given == ["system: Be brief.", "one"]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"options": {"temperature": 9}}, "temperature"),
        ({"options": {"max_tokens": 0}}, "max_tokens"),
        ({"options": {"top_p": "high"}}, "top_p"),
        ({"options": {"effort": "huge"}}, "effort"),
        ({"options": {"colour": "red"}}, "colour"),
        ({"answer": ""}, "turn"),
        ({"history": "all of it"}, "history"),
        ({"history": [{"id": "x", "role": "king", "text": ""}]}, "role"),
    ],
)
def test_a_wrong_turn_is_a_failed_answer_that_names_the_field(
    stand: Stand, given: dict[str, Any], field: str
) -> None:
    last = stand.turn(**{"text": "one", **given})[-1]
    assert last["phase"] == "failed" and last["error"]["code"] == "invalid_value"
    assert field in last["error"]["message"]


@pytest.mark.parametrize("given", [None, "text", 7, [], {"noop": True}])
def test_nothing_that_the_browser_sends_raises(stand: Stand, given: Any) -> None:
    async def run() -> list[Any]:
        return [s async for s in run_turn(stand.service, stand.memory, given)]

    assert all(s["phase"] == "failed" for s in asyncio.run(run()))


def test_an_error_in_the_middle_keeps_the_words_and_remembers_them(stand: Stand) -> None:
    stand.engine.script = [Say(encoded("Well")), EngineFailed("The step failed.")]
    last = stand.turn(text="one")[-1]
    assert (last["phase"], last["text"]) == ("failed", "Well")
    node = stand.memory.node("a1")
    assert node is not None and node.parts == (TextPart("Well"),)


def test_a_bug_is_a_message_and_its_trace_is_in_the_log_only(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stand.service, "chat", lambda request: 1 / 0)
    last = stand.turn(text="one")[-1]
    assert last["error"]["code"] == "server_error"
    assert "ZeroDivision" not in str(last) and "ZeroDivisionError" in caplog.text


def test_a_question_waits_for_the_model_and_is_then_answered() -> None:
    stand = Stand()

    async def run() -> list[str]:
        turn = {"answer": "a", "question": "q", "text": "one"}
        phases = []
        async for snapshot in run_turn(stand.service, stand.memory, turn):
            phases.append(snapshot["phase"])
            if len(phases) == 2:
                stand.attach()
        return phases

    phases = asyncio.run(run())
    assert phases[:2] == ["waiting", "waiting"] and phases[-1] == "done"


def test_a_model_that_failed_to_load_is_an_answer_at_once() -> None:
    stand = Stand()
    stand.service.report(Progress("failed"))
    assert stand.turn(text="one")[-1]["error"]["code"] == "unavailable"


def test_another_model_is_switched_to_and_waited_for(stand: Stand) -> None:
    stand.service.offer(["m", "other"])

    async def run() -> tuple[list[str], str | None]:
        turn = {"answer": "a", "question": "q", "text": "one", "options": {"model": "other"}}
        visit = Visit(may_switch=True)
        phases, wanted = [], None
        async for snapshot in run_turn(stand.service, stand.memory, turn, [], visit):
            phases.append(snapshot["phase"])
            if wanted is None and snapshot["phase"] == "waiting":
                wanted = stand.service.wait_for_switch()
                stand.attach("other")
        return phases, wanted

    phases, wanted = asyncio.run(run())
    assert wanted == "other" and phases[-1] == "done"
    assert stand.format.requests[-1].model == "other"


def test_who_may_not_switch_is_told_so(stand: Stand) -> None:
    stand.service.offer(["m", "other"])
    last = stand.turn(text="one", options={"model": "other"})[-1]
    assert last["error"]["code"] == "insufficient_permissions"


# ---- files ----


@pytest.mark.parametrize("vision", [True, False, None])
def test_a_picture_goes_to_who_sees_or_may_see_and_is_left_out_for_who_does_not(
    tmp_path: Path, vision: bool | None
) -> None:
    stand = Stand(vision)
    stand.attach()
    file = tmp_path / "p.png"
    file.write_bytes(PICTURE)
    last = stand.turn(files=[str(file)], text="what is it?")[-1]
    assert last["phase"] == "done"
    images = stand.format.requests[-1].messages[-1].images
    assert len(images) == (0 if vision is False else 1)
    codes = [note["code"] for note in last["notes"]]
    assert codes == (["images_not_used"] if vision is False else [])


def test_a_picture_refused_by_a_model_of_unknown_sight_is_left_out(tmp_path: Path) -> None:
    stand = Stand(None, refuses_pictures=True)
    stand.attach()
    file = tmp_path / "p.png"
    file.write_bytes(PICTURE)
    last = stand.turn(files=[str(file)], text="what is it?")[-1]
    assert (last["phase"], last["text"]) == ("done", "Fine.")
    assert [note["code"] for note in last["notes"]] == ["images_not_used"]


def test_an_edited_question_keeps_its_files(stand: Stand, tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_text("plum")
    stand.turn(files=[str(file)], text="what?")
    stand.turn(answer="a2", question="q2", text="which fruit?", keep_files_of="q1")
    assert stand.given == ["[note.txt]\nplum\n[/note.txt]\n\nwhich fruit?"]


def test_pictures_come_back_from_the_browser(stand: Stand) -> None:
    data = base64.b64encode(PICTURE).decode()
    files = [{"kind": "image", "data": data}, {"kind": "text", "name": "n", "text": "plum"}]
    node = {"id": "q1", "parent": "", "role": "user", "text": "look", "files": files}
    assert stand.turn(history=[node])[-1]["phase"] == "done"
    message = stand.format.requests[-1].messages[-1]
    assert message.images[0].data == PICTURE
    bad = {**node, "files": [{"kind": "image", "data": "bm90IGEgcGljdHVyZQ=="}]}
    assert stand.turn(history=[bad])[-1]["error"]["code"] == "invalid_value"


# ---- memory ----


def test_a_full_memory_forgets_all_rather_than_half() -> None:
    memory = Memory()
    memory.remember(Node("a", "", "user", (TextPart("x" * (MAX_WEIGHT // 2)),)))
    memory.remember(Node("b", "a", "assistant", (TextPart("x" * (MAX_WEIGHT // 2 + 2)),)))
    assert memory.path("b") is None
    assert memory.node("b") is not None and memory.node("a") is None


def test_a_circle_of_parents_is_no_conversation() -> None:
    memory = Memory()
    memory.remember(Node("a", "b", "user", ()))
    memory.remember(Node("b", "a", "assistant", ()))
    assert memory.path("a") is None
