"""Harmony ids to events: total, nothing lost, no header text or control token anywhere."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.face import TokenScore
from serve.formats.base import StreamParser
from serve.formats.calls import snap
from serve.formats.harmony import HarmonyFormat
from serve.formats.harmony_parse import BETWEEN, MAX_HEADER_TOKENS
from serve.formats.harmony_render import marks_of
from serve.formats.vocabulary import Vocabulary
from serve.values import (
    ChatRequest,
    Message,
    ResponseFormat,
    Sampling,
    TextDelta,
    TextPart,
    Tool,
    ToolChoice,
)
from tests.o200k import SPECIAL, harmony_tokenizer
from tests.parsing import joined, read, read_every_way

TOOLS = (Tool("get_weather"), Tool("manage_cart"), Tool("final_report"))
ASK = Message("user", (TextPart("x"),))


@cache
def harmony() -> HarmonyFormat:
    words = Vocabulary(harmony_tokenizer(), 201088)
    marks = marks_of(words)
    assert marks is not None
    return HarmonyFormat(words, marks)


def ids_of(text: str) -> list[int]:
    return list(harmony_tokenizer().encode(text, add_special_tokens=False))


def maker(tools: Sequence[Tool] = TOOLS, **options: object) -> Callable[[], StreamParser]:
    request = ChatRequest([ASK], tools=tuple(tools), **options)  # type: ignore[arg-type]
    return lambda: harmony().parser(request)


def told(text: str, tools: Sequence[Tool] = TOOLS, **options: object) -> list[tuple[str, int, str]]:
    return read_every_way(maker(tools, **options), ids_of(text))[0]


FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"
NEXT = "<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"

# What the model writes after "<|start|>assistant", and what it says: (kind, call, text).
CASES: dict[str, tuple[str, list[tuple[str, int, str]]]] = {
    "an answer": (f"{FINAL}Hi there.<|return|>", [("text", 0, "Hi there.")]),
    "reasoning, then an answer": (
        f"{ANALYSIS}They greet.{NEXT}{FINAL}Hi 👩‍👩‍👧!<|return|>",
        [("reasoning", 0, "They greet."), ("text", 0, "Hi 👩‍👩‍👧!")],
    ),
    "a call": (
        f'{ANALYSIS}Need it.{NEXT}{CALL}{{"city": "Paris"}}<|call|>',
        [
            ("reasoning", 0, "Need it."),
            ("call", 0, "get_weather"),
            ("arguments", 0, '{"city": "Paris"}'),
        ],
    ),
    "the recipient before the channel": (
        " to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        [("call", 0, "get_weather"), ("arguments", 0, "{}")],
    ),
    "a call on the analysis channel": (
        "<|channel|>analysis to=functions.get_weather<|message|>{}<|call|>",
        [("call", 0, "get_weather"), ("arguments", 0, "{}")],
    ),
    "no space before the constraint": (
        "<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>{}<|call|>",
        [("call", 0, "get_weather"), ("arguments", 0, "{}")],
    ),
    "a constraint without its token": (
        "<|channel|>commentary to=functions.get_weather json<|message|>{}<|call|>",
        [("call", 0, "get_weather"), ("arguments", 0, "{}")],
    ),
    "a recipient without to=": (
        "<|channel|>commentary functions.get_weather<|message|>{}<|call|>",
        [("call", 0, "get_weather"), ("arguments", 0, "{}")],
    ),
    "control tokens in the recipient": (
        "<|channel|>commentary to=functions.manage_cart<|channel|>commentary<|message|>{}<|call|>",
        [("call", 0, "manage_cart"), ("arguments", 0, "{}")],
    ),
    "channel words stuck to the name": (
        "<|channel|>commentary to=functions.manage_cartcommentary<|message|>{}<|call|>",
        [("call", 0, "manage_cart"), ("arguments", 0, "{}")],
    ),
    "a channel word inside the name": (
        "<|channel|>commentary to=functions.final_report<|message|>{}<|call|>",
        [("call", 0, "final_report"), ("arguments", 0, "{}")],
    ),
    "an undeclared name": (
        "<|channel|>commentary to=functions.launch<|message|>{}<|call|>",
        [("call", 0, "launch"), ("arguments", 0, "{}")],
    ),
    "an undeclared built-in": (
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        [("call", 0, "python"), ("arguments", 0, "print(1)")],
    ),
    "an empty recipient": (
        "<|channel|>commentary to=<|message|>kept<|end|>",
        [("text", 0, "kept")],
    ),
    "a call without arguments": (
        f"{CALL}<|call|>",
        [("call", 0, "get_weather"), ("arguments", 0, "{}")],
    ),
    "arguments that are no JSON": (
        f"{CALL}city = Paris<|call|>",
        [("call", 0, "get_weather"), ("arguments", 0, "city = Paris")],
    ),
    "a preamble, then a call": (
        f"<|channel|>commentary<|message|>Let me look.{NEXT}{CALL}{{}}<|call|>",
        [("text", 0, "Let me look."), ("call", 0, "get_weather"), ("arguments", 0, "{}")],
    ),
    "two calls": (
        f"{CALL}{{}}{NEXT}{CALL.replace('get_weather', 'manage_cart')}[1]<|call|>",
        [
            ("call", 0, "get_weather"),
            ("arguments", 0, "{}"),
            ("call", 1, "manage_cart"),
            ("arguments", 1, "[1]"),
        ],
    ),
    "two thoughts": (
        f"{ANALYSIS}One.{NEXT}{ANALYSIS}Two.{NEXT}{FINAL}Three.<|return|>",
        [("reasoning", 0, f"One.{BETWEEN}Two."), ("text", 0, "Three.")],
    ),
    "a channel without start": (
        f"{ANALYSIS}One.{FINAL}Two.<|return|>",
        [("reasoning", 0, "One."), ("text", 0, "Two.")],
    ),
    "a start without end": (
        f"{ANALYSIS}One.<|start|>assistant{FINAL}Two.<|return|>",
        [("reasoning", 0, "One."), ("text", 0, "Two.")],
    ),
    "no channel": ("<|message|>Hello<|return|>", [("text", 0, "Hello")]),
    "no header at all": (
        "Hello there, how are you?<|return|>",
        [("text", 0, "Hello there, how are you?")],
    ),
    "a channel without message": (
        "<|channel|>final Hello there<|return|>",
        [("text", 0, "Hello there")],
    ),
    "analysis without message": (
        f"<|channel|>analysis They ask.{NEXT}{FINAL}Hi<|return|>",
        [("reasoning", 0, "They ask."), ("text", 0, "Hi")],
    ),
    "a call without message": (
        '<|channel|>commentary to=functions.get_weather <|constrain|>json{"a": 1}<|call|>',
        [("call", 0, "get_weather"), ("arguments", 0, '{"a": 1}')],
    ),
    "an unknown channel": ("<|channel|>thoughts<|message|>Hm<|return|>", [("text", 0, "Hm")]),
    "text between messages": (
        f"{FINAL}One.<|end|>Two.<|start|>assistant{FINAL}Three.<|return|>",
        [("text", 0, f"One.{BETWEEN}Two.{BETWEEN}Three.")],
    ),
    "the assistant's name without start": (
        f"{ANALYSIS}One.<|end|>assistant{FINAL}Two.<|return|>",
        [("reasoning", 0, "One."), ("text", 0, "Two.")],
    ),
    "message twice": (f"{FINAL}One<|message|> two<|return|>", [("text", 0, "One two")]),
    "a constraint in the text": (
        f"{FINAL}One<|constrain|> two<|return|>",
        [("text", 0, "One two")],
    ),
    "reserved tokens": (
        f"{FINAL}One<|reserved_200014|> two<|endoftext|><|return|>",
        [("text", 0, "One two")],
    ),
    "only control tokens": ("<|start|><|channel|><|message|><|end|><|call|><|return|>", []),
    "nothing": ("", []),
    "cut in the channel": (f"{ANALYSIS}One.{NEXT}<|channel|>", [("reasoning", 0, "One.")]),
    "cut in a channel word": (
        f"{ANALYSIS}One.{NEXT}<|channel|>comment",
        [("reasoning", 0, "One.")],
    ),
    "cut in the recipient": ("<|channel|>commentary to=functions.get", []),
    "cut in reasoning": (f"{ANALYSIS}One tw", [("reasoning", 0, "One tw")]),
    "cut in arguments": (
        f'{CALL}{{"city": "Pa',
        [("call", 0, "get_weather"), ("arguments", 0, '{"city": "Pa')],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_model_writes_is_told_the_same_however_its_ids_arrive(name: str) -> None:
    written, expected = CASES[name]
    assert told(written) == expected


def test_markup_that_the_model_spells_out_is_text() -> None:
    ids = (
        ids_of(FINAL)
        + harmony()._vocabulary.encode_plain("say <|channel|> now")
        + ids_of("<|return|>")
    )
    assert read_every_way(maker(), ids)[0] == [("text", 0, "say <|channel|> now")]


def test_the_reason_is_tool_calls_only_when_calls_were_made_and_length_wins() -> None:
    parser = maker()()
    parser.feed(ids_of(f"{CALL}{{}}<|call|>"))
    assert parser.reason("stop") == "tool_calls"
    assert parser.reason("length") == "length"
    plain = maker()()
    plain.feed(ids_of(f"{FINAL}x<|return|>"))
    assert plain.reason("stop") == "stop"


def test_reasoning_tokens_are_the_ids_of_the_analysis() -> None:
    thought = "They ask for the weather."
    *_, count = read_every_way(maker(), ids_of(f"{ANALYSIS}{thought}{NEXT}{FINAL}Hi<|return|>"))
    assert count == len(ids_of(thought))


def test_without_tools_a_call_comes_out_as_text() -> None:
    for options in ({}, {"tool_choice": ToolChoice("none")}):
        tools = () if not options else TOOLS
        assert told(f'{CALL}{{"a": 1}}<|call|>', tools, **options) == [("text", 0, '{"a": 1}')]


def test_one_call_at_most_when_calls_are_not_parallel() -> None:
    written = f"{CALL}{{}}{NEXT}{CALL}[1]<|call|>"
    assert told(written, parallel_tool_calls=False) == [
        ("call", 0, "get_weather"),
        ("arguments", 0, "{}"),
    ]
    parser = maker(parallel_tool_calls=False)()
    parser.feed(ids_of(written))
    assert parser.is_stopped and parser.reason("stop") == "tool_calls"


def test_with_a_response_format_content_is_the_final_answer_only() -> None:
    written = f"<|channel|>commentary<|message|>Plan.{NEXT}{FINAL}{{}}<|return|>"
    answer = ResponseFormat("json_object")
    assert told(written, response_format=answer) == [("reasoning", 0, "Plan."), ("text", 0, "{}")]


def test_stop_strings_end_content_and_are_not_seen_in_reasoning() -> None:
    written = f"{ANALYSIS}END is near{NEXT}{FINAL}one END two<|return|>"
    stopping = Sampling(stop=("END",))
    assert told(written, sampling=stopping) == [
        ("reasoning", 0, "END is near"),
        ("text", 0, "one "),
    ]


def test_logprobs_cover_content_tokens_only() -> None:
    parser = maker(sampling=Sampling(logprobs=0))()
    ids = ids_of(f"{ANALYSIS}Hm.{NEXT}{FINAL}Hi 👩‍👩‍👧 you<|return|>")
    found = parser.feed(ids, [TokenScore(-1.0)] * len(ids))
    found += parser.finish()
    data = b"".join(p.data for e in found if isinstance(e, TextDelta) for p in e.logprobs)
    assert data.decode() == "Hi 👩‍👩‍👧 you"


def test_a_continued_answer_starts_in_the_text() -> None:
    request = ChatRequest(
        [ASK, Message("assistant", (TextPart("one"),))], continue_final_message=True
    )
    found, *_ = read_every_way(lambda: harmony().parser(request), ids_of(", two<|return|>"))
    assert found == [("text", 0, ", two")]


def test_an_answer_without_any_header_streams_before_its_end() -> None:
    parser = maker()()
    words = ids_of("one two three four five six seven eight nine ten " * 20)
    found = parser.feed(words[: MAX_HEADER_TOKENS + 8])
    assert joined(read(maker()(), [words])[0], "text").startswith("one two three")
    assert found


@pytest.mark.parametrize("name", CASES)
def test_a_cut_anywhere_keeps_what_was_said_and_leaks_no_header(name: str) -> None:
    written, expected = CASES[name]
    ids = ids_of(written)
    whole = {kind: joined(expected, kind) for kind in ("text", "reasoning")}
    for end in range(len(ids)):
        found = read(maker()(), [ids[:end]])[0]
        if "without message" in name or "no header" in name or "between" in name:
            continue  # cut there, what is header and what is text cannot be told apart
        for kind, text in whole.items():
            said = joined(found, kind).removesuffix("\ufffd")
            assert text.startswith(said), (name, end)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("functions.get_weather", "get_weather"),
        ("get_weather", "get_weather"),
        ("Get_Weather", "get_weather"),
        ("functions.get_weatherjson", "get_weather"),
        ("functions.get_weather_now", "get_weather_now"),
        ("functions.get_weather{", "get_weather"),
        ("ns.get_weather", "get_weather"),
        ("launch!", "launch"),
        ("launchcommentary", "launch"),
        ("run_analysis", "run_analysis"),
        ("", ""),
        ("functions.", ""),
        ("???", ""),
    ],
)
def test_names_are_cut_clean_and_matched_to_the_declared_tools(written: str, name: str) -> None:
    assert snap(written, [tool.name for tool in TOOLS]) == name


# -- any ids at all --------------------------------------------------------------------------------

HEADER_WORDS = ("analysis", "commentary", "final", "assistant", " to=functions.get_weather", "json")
SAID = ("apple", " pear", "plum", " {", '"k"', "\n", "👩‍👩‍👧", " fig", '.",', "_x", "é")


@cache
def alphabet() -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    marks = [[harmony_tokenizer().convert_tokens_to_ids(token)] for token in SPECIAL]
    return marks, [ids_of(word) for word in HEADER_WORDS], [ids_of(word) for word in SAID]


def check(pieces: list[tuple[int, list[int]]]) -> None:
    """Everything that must hold of any ids: `pieces` are (0 control | 1 header word | 2 said)."""
    ids = [token for _, piece in pieces for token in piece]
    found = read(maker()(), [ids])[0]
    fields = [text for _, _, text in found]
    assert not any(mark in text for text in fields for mark in SPECIAL)
    if not may_say_header_words(pieces):
        for text in fields:
            names = [word.strip() for word in HEADER_WORDS]
            shown = text.replace("get_weather", "") if text == "get_weather" else text
            assert not any(word in shown for word in names), (text, pieces)


def may_say_header_words(pieces: list[tuple[int, list[int]]]) -> bool:
    """Whether a header word stands where text stands: inside a message, or after words of text in a
    header that is none."""
    inside = False
    for kind, piece in pieces:
        if kind == 2:
            inside = True
        elif kind == 1 and inside:
            return True
        elif kind == 0 and piece[0] in message_edges():
            inside = piece == [harmony()._marks.message]
    return False


def message_edges() -> tuple[int, ...]:
    """The control ids that begin or end a header or a message."""
    marks = harmony()._marks
    return (marks.start, marks.channel, marks.message, marks.end, marks.returns, marks.call)


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    kinds = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2]), max_size=24))
    return [(kind, draw(st.sampled_from(alphabet()[kind]))) for kind in kinds]


@given(sequences())
@settings(max_examples=500, deadline=None)
def test_no_control_token_or_header_text_in_any_field(pieces: list[tuple[int, list[int]]]) -> None:
    check(pieces)


@given(sequences())
@settings(max_examples=200, deadline=None)
def test_any_ids_are_told_the_same_however_they_arrive(pieces: list[tuple[int, list[int]]]) -> None:
    read_every_way(maker(), [token for _, piece in pieces for token in piece])


@given(sequences())
@settings(max_examples=300, deadline=None)
def test_no_text_that_stands_in_a_message_is_lost(pieces: list[tuple[int, list[int]]]) -> None:
    found = "".join(text for _, _, text in read(maker()(), [[t for _, p in pieces for t in p]])[0])
    inside = False
    written: Counter[str] = Counter()
    for kind, piece in pieces:
        if kind == 0 and piece[0] in message_edges():
            inside = piece == [harmony()._marks.message]
        elif inside and kind == 2:
            written[SAID[alphabet()[2].index(piece)]] += 1
    for text, count in written.items():
        assert found.count(text) >= count


def sweep(count: int, seed: int) -> None:
    draw = random.Random(seed)
    pools = alphabet()
    for _ in range(count):
        pieces = []
        for _ in range(draw.randrange(1, 20)):
            kind = draw.choice((0, 0, 1, 1, 2, 3))
            piece = [any_word(draw)] if kind == 3 else draw.choice(pools[kind])
            pieces.append((2 if kind == 3 else kind, piece))
        check(pieces)


def any_word(draw: random.Random) -> int:
    """Any id of the model's output layer that is no control token and holds no header word."""
    while True:
        token = draw.randrange(201088)
        text = harmony()._vocabulary.bytes_of(token).decode("utf-8", "replace")
        if token not in harmony()._vocabulary.control_ids and not any(
            word.strip() in text.lower() or text.lower().strip() in word for word in HEADER_WORDS
        ):
            return token


def test_random_ids_never_raise_and_never_leak() -> None:
    sweep(3000, seed=1)


@pytest.mark.slow
def test_a_million_random_id_sequences() -> None:
    sweep(1_000_000, seed=2)
