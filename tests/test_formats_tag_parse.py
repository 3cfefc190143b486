"""Reasoning tags and the families' tool calls: read, whatever the vocabulary and the cuts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.errors import Unsupported
from serve.formats.base import ChatFormat
from serve.formats.choose import choose
from serve.formats.json_calls import JsonSpan
from serve.values import (
    ChatRequest,
    Message,
    ResponseFormat,
    Sampling,
    TextPart,
    Tool,
    ToolChoice,
)
from tests.dialect_templates import TEMPLATES, tokenizer
from tests.parsing import Told, joined, read, read_every_way
from tests.walking import follow, wander

ASK = [Message("user", (TextPart("x"),))]
AT = {
    "type": "object",
    "properties": {"at": {"type": "integer"}, "where": {"type": "string"}},
    "required": ["at"],
}
TOOLS = (Tool("look", "", AT), Tool("get_weather", "", None))
LOOK = [("call", 0, "look"), ("arguments", 0, '{"at": 3}')]
SPELLINGS = ("spelled", "added", "special")


def speaking(family: str, tags: str = "spelled") -> tuple[ChatFormat, Any]:
    words = tokenizer(family, tags)
    return choose(words, "x", frozenset({words.eos_token_id})), words


def told(
    family: str, text: str, tools: Sequence[Tool] = TOOLS, tags: str = "spelled", **options: Any
) -> tuple[list[Told], str, int]:
    fmt, words = speaking(family, tags)
    request = ChatRequest(ASK, tools=tuple(tools), **options)
    ids = words.encode(text + "<|im_end|>", add_special_tokens=False)
    return read_every_way(lambda: fmt.parser(request), ids)


# family: {what: (written, told)}
CASES: dict[str, dict[str, tuple[str, list[Told]]]] = {
    "qwen3": {
        "an answer": ("Hi there", [("text", 0, "Hi there")]),
        "reasoning": (
            "<think>\nThey greet.\n</think>\n\nHi there",
            [("reasoning", 0, "They greet."), ("text", 0, "Hi there")],
        ),
        "empty reasoning": ("<think>\n\n</think>\n\nHi", [("text", 0, "Hi")]),
        "reasoning, then a call": (
            '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {"at": 3}}\n'
            "</tool_call>",
            [("reasoning", 0, "Hm."), *LOOK],
        ),
        "a call inside reasoning": (
            '<think>\nHm. <tool_call>\n{"name": "look", "arguments": {"at": 3}}\n</tool_call>',
            [("reasoning", 0, "Hm."), *LOOK],
        ),
        "text, two calls, text": (
            'Looking.\n<tool_call>\n{"name": "look", "arguments": {"at": 3}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>\nDone',
            [
                ("text", 0, "Looking."),
                *LOOK,
                ("call", 1, "get_weather"),
                ("arguments", 1, "{}"),
                ("text", 0, "Done"),
            ],
        ),
        "keys in another order": (
            '<tool_call>{"arguments": {"at": 3}, "name": "look"}</tool_call>',
            LOOK,
        ),
        "arguments as a string": (
            '<tool_call>{"name": "look", "arguments": "{\\"at\\": 3}"}</tool_call>',
            LOOK,
        ),
        "a nested function": (
            '<tool_call>{"type": "function", "function": {"name": "look", "arguments": '
            '{"at": 3}}}</tool_call>',
            LOOK,
        ),
        "braces and quotes in strings": (
            '<tool_call>{"name": "look", "arguments": {"at": "}\\"]</tool_call>{"}}</tool_call>',
            [("call", 0, "look"), ("arguments", 0, '{"at": "}\\"]</tool_call>{"}')],
        ),
        "an undeclared name": (
            '<tool_call>{"name": "launch", "arguments": {}}</tool_call>',
            [("call", 0, "launch"), ("arguments", 0, "{}")],
        ),
        "no arguments": (
            '<tool_call>{"name": "look"}</tool_call>',
            [("call", 0, "look"), ("arguments", 0, "{}")],
        ),
        "null arguments": (
            '<tool_call>{"name": "look", "arguments": null}</tool_call>',
            [("call", 0, "look"), ("arguments", 0, "{}")],
        ),
        "no call inside the tags": (
            "<tool_call>never mind</tool_call>",
            [("text", 0, "never mind")],
        ),
        "broken JSON inside the tags": (
            '<tool_call>{"name": look}</tool_call>',
            [("text", 0, '{"name": look}')],
        ),
        "cut in the arguments": (
            '<tool_call>\n{"name": "look", "arguments": {"at": ',
            [("call", 0, "look"), ("arguments", 0, '{"at": ')],
        ),
        "cut in the closing tag": (
            '<tool_call>\n{"name": "look", "arguments": {"at": 3}}\n</tool_c',
            LOOK,
        ),
        "cut in the head": ('<tool_call>{"name": "lo', [("text", 0, '{"name": "lo')]),
        "cut in reasoning": ("<think>\nOne tw", [("reasoning", 0, "One tw")]),
        "a tag begun": (
            "a < b and a <tool is no tag",
            [("text", 0, "a < b and a <tool is no tag")],
        ),
        "the closing tag alone": ("Hm.</think> Hi", [("text", 0, "Hm. Hi")]),
    },
    "r1": {
        "the prompt opened the reasoning": (
            "They greet.\n</think>\n\nHi",
            [("reasoning", 0, "They greet."), ("text", 0, "Hi")],
        ),
        "never closed": ("They greet.", [("reasoning", 0, "They greet.")]),
    },
    "llama": {
        "a bare call": ('{"name": "look", "parameters": {"at": 3}}', LOOK),
        "typed": ('{"type": "function", "name": "look", "parameters": {"at": 3}}', LOOK),
        "after the python tag": ('<|python_tag|>{"name": "look", "parameters": {"at": 3}}', LOOK),
        "two": (
            '{"name": "look", "parameters": {"at": 3}}; {"name": "get_weather", "parameters": {}}',
            [*LOOK, ("call", 1, "get_weather"), ("arguments", 1, "{}")],
        ),
        "an object that is no call": ('{"answer": 42}', [("text", 0, '{"answer": 42}')]),
        "an undeclared name": (
            '{"name": "Ann", "parameters": 3}',
            [("text", 0, '{"name": "Ann", "parameters": 3}')],
        ),
        "text": ("Hello { there", [("text", 0, "Hello { there")]),
    },
    "json": {
        "a bare call": ('{"name": "look", "arguments": {"at": 3}}', LOOK),
        "text": ("It is sunny.", [("text", 0, "It is sunny.")]),
    },
    "mistral": {
        "a list": ('[TOOL_CALLS][{"name": "look", "arguments": {"at": 3}}]', LOOK),
        "a list of two": (
            '[TOOL_CALLS] [{"name": "look", "arguments": {"at": 3}}, '
            '{"name": "get_weather", "arguments": {}, "id": "abc"}]',
            [*LOOK, ("call", 1, "get_weather"), ("arguments", 1, "{}")],
        ),
        "text first": (
            'Looking. [TOOL_CALLS][{"name": "look", "arguments": {"at": 3}}]',
            [("text", 0, "Looking."), *LOOK],
        ),
    },
    "mistral-args": {
        "one": ('[TOOL_CALLS]look[ARGS]{"at": 3}', LOOK),
        "two": (
            '[TOOL_CALLS]look[ARGS]{"at": 3}[TOOL_CALLS]get_weather[ARGS]{}',
            [*LOOK, ("call", 1, "get_weather"), ("arguments", 1, "{}")],
        ),
        "without the second tag": ('[TOOL_CALLS]look{"at": 3}', LOOK),
    },
    "xml": {
        "a call": (
            "<tool_call>\n<function=look>\n<parameter=at>\n3\n</parameter>\n<parameter=where>\n"
            "12\n</parameter>\n</function>\n</tool_call>",
            [("call", 0, "look"), ("arguments", 0, '{"at": 3, "where": "12"}')],
        ),
        "several lines": (
            "Go.\n<tool_call>\n<function=look>\n<parameter=where>\na\n b\n</parameter>\n"
            "</function>\n</tool_call>",
            [("text", 0, "Go."), ("call", 0, "look"), ("arguments", 0, '{"where": "a\\n b"}')],
        ),
        "no function": ("<tool_call>hm</tool_call>", [("text", 0, "hm")]),
        "cut": (
            "<tool_call>\n<function=look>\n<parameter=at>\n3",
            [("text", 0, "\n<function=look>\n<parameter=at>\n3")],
        ),
    },
}
ALL = [(family, what) for family, cases in CASES.items() for what in cases]


@pytest.mark.parametrize("tags", SPELLINGS)
@pytest.mark.parametrize(("family", "what"), ALL)
def test_what_is_written_is_told_the_same_however_it_is_spelled_and_cut(
    family: str, what: str, tags: str
) -> None:
    written, expected = CASES[family][what]
    if tags == "special" and ("cut in the closing" in what or "braces" in what):
        pytest.skip("a special token cannot be spelled inside a string or be cut")
    found, reason, _ = told(family, written, tags=tags)
    assert found == expected
    assert reason == ("tool_calls" if any(kind == "call" for kind, *_ in expected) else "stop")


def test_tags_are_text_where_no_tools_were_declared() -> None:
    written = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    assert told("hermes", written, tools=())[0] == [("text", 0, written)]
    none = ToolChoice("none")
    assert told("hermes", written, tool_choice=none)[0] == [("text", 0, written)]


def test_one_call_at_most_when_calls_are_not_parallel() -> None:
    one = '<tool_call>{"name": "look", "arguments": {"at": 3}}</tool_call>'
    assert told("hermes", one + one, parallel_tool_calls=False)[0] == LOOK


def test_reasoning_tokens_are_counted() -> None:
    _, words = speaking("qwen3", "added")
    thought = "They greet me."
    found = told("qwen3", f"<think>{thought}</think>Hi", tags="added")
    assert found[2] == len(words.encode(thought)) + 1  # and the tag that closes it


def test_stop_strings_are_for_content_only() -> None:
    stopping = Sampling(stop=("END",))
    found = told("qwen3", "<think>END</think>one END two", sampling=stopping)[0]
    assert found == [("reasoning", 0, "END"), ("text", 0, "one ")]


def test_switching_reasoning_off_starts_after_it() -> None:
    for options in ({"reasoning_effort": "none"}, {"template_options": {"enable_thinking": False}}):
        fmt, words = speaking("qwen3")
        prompt = words.decode(fmt.render(ChatRequest(ASK, **options)).prompt.ids)  # type: ignore[arg-type]
        assert prompt.endswith("<think>\n\n</think>\n\n")
        assert told("qwen3", "Hi", **options)[0] == [("text", 0, "Hi")]


def test_efforts_that_a_model_cannot_be_asked_for_are_refused_by_name() -> None:
    def ask(family: str, **options: Any) -> None:
        speaking(family)[0].render(ChatRequest(ASK, **options))

    ask("plain", reasoning_effort="none")
    ask("plain", reasoning_effort="high")  # left alone: it may have been sent to another model
    ask("r1", reasoning_effort="high")
    with pytest.raises(Unsupported) as refused:
        ask("r1", reasoning_effort="none")
    assert refused.value.param == "reasoning_effort"
    with pytest.raises(Unsupported) as refused:
        ask("plain", template_options={"enable_thinking": True})
    assert refused.value.param == "enable_thinking"


def test_what_a_model_can_do_is_read_from_its_template() -> None:
    can = {name: speaking(name)[0].capabilities() for name in TEMPLATES}
    assert {name for name, c in can.items() if c.tools} == set(TEMPLATES) - {"r1", "plain"}
    assert {name for name, c in can.items() if c.reasoning} == {"qwen3", "r1"}
    assert can["qwen3"].efforts == ("none", "medium") and can["r1"].efforts == ()


WORDS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "{", "}", '"',
    '{"name": "look", "arguments": ', '{"name": "look", "parameters": ', '{"at": 3}', "[", "]",
    "look", ", ", "\n", " ", "<function=look>", "<parameter=at>", "</parameter>", "</function>",
    "apple", "\\", "<|python_tag|>", "<", "</", "<|im_end|>",
]  # fmt: skip


@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.sampled_from(WORDS), max_size=12))
@example("json", ['{"name": "look", "arguments": ', "apple"])
@example("mistral", ["[TOOL_CALLS]", '{"name": "look", "arguments": ', ", ", "apple"])
@example("hermes", ["<tool_call>", '{"name": "look", "arguments": ', "{}", "</tool_call>", "apple"])
@settings(max_examples=400, deadline=None)
def test_anything_at_all_is_read_without_raising_and_the_same_however_cut(
    family: str, words: list[str]
) -> None:
    found, _, _ = told(family, "".join(words), tags="spelled")
    everything = "".join(text for _, _, text in found)
    assert everything.count("apple") >= "".join(words).count("apple") - ("<function" in words)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=8,
    ).filter(lambda value: isinstance(value, str | list | dict)),
    st.integers(0, 40),
)
@settings(max_examples=300, deadline=None)
def test_the_end_of_a_json_value_is_found_wherever_it_is_cut(value: Any, cut: int) -> None:
    text = json.dumps(value)
    cut = min(max(cut, 1), len(text))
    span = JsonSpan()
    first = span.end(text[:cut], start=True)
    if first is None:
        second = span.end(text[cut:] + " tail")
        assert second is not None and cut + second == len(text)
    else:
        assert first == len(text) == cut


# -- what binds an answer --------------------------------------------------------------------------

STRICT = (Tool("look", "", {**AT, "additionalProperties": False}, strict=True), TOOLS[1])
FORCED = ToolChoice("required", ("look",))
FORCED_CALLS = {
    "qwen3": '<tool_call>\n{"name": "look", "arguments": {"at": 3}}\n</tool_call>',
    "hermes": '<tool_call>\n{"name": "look", "arguments": {"at": 3}}\n</tool_call>',
    "llama": '{"name": "look", "parameters": {"at": 3}}',
    "json": '{"name": "look", "arguments": {"at": 3}}',
    "mistral": '[TOOL_CALLS][{"name": "look", "arguments": {"at": 3}}]',
    "mistral-args": '[TOOL_CALLS]look[ARGS]{"at": 3}',
    "xml": "<tool_call>\n<function=look>\n<parameter=at>\n3\n</parameter>\n</function>\n"
    "</tool_call>",
}


def goes(family: str, text: str, tags: str = "added", **options: Any) -> bool:
    """Whether all of `text` may be written."""
    fmt, words = speaking(family, tags)
    grammar = fmt.render(ChatRequest(ASK, **options)).grammar
    assert grammar is not None
    ids = words.encode(text, add_special_tokens=False)
    return follow(grammar, fmt._vocabulary, ids)[0] == len(ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("tags", SPELLINGS)
@pytest.mark.parametrize("family", FORCED_CALLS)
def test_a_forced_call_is_written_in_the_familys_own_syntax_and_read_back(
    family: str, tags: str
) -> None:
    forced = {"tools": TOOLS, "tool_choice": FORCED}
    call = FORCED_CALLS[family]
    assert goes(family, call, tags, **forced)
    assert not goes(family, call.replace("look", "get_weather"), tags, **forced)
    assert not goes(family, "Sure", tags, **forced)
    assert not goes(family, call.replace("3", '"three"').replace('""', '"'), tags, **forced)
    assert told(family, call, tags=tags)[0] == LOOK


@pytest.mark.parametrize("tags", SPELLINGS)
def test_reasoning_stays_free_before_what_is_held(tags: str) -> None:
    answer = {"response_format": ResponseFormat("json_object")}
    assert goes("qwen3", '<think>\nSo "free" < text\n</think>\n\n{"a": 1}', tags, **answer)
    assert goes("qwen3", '{"a": 1}', tags, **answer)
    assert not goes("qwen3", "<think>\nHm\n</think>\n\nSure", tags, **answer)
    assert goes("r1", 'Hm\n</think>\n\n{"a": 1}', tags, **answer)
    assert not goes("r1", "Hm\n</think>\n\nSure", tags, **answer)
    off = {**answer, "reasoning_effort": "none"}
    assert goes("qwen3", '{"a": 1}', tags, **off)
    assert not goes("qwen3", "<think>", tags, **off)


@pytest.mark.parametrize("tags", SPELLINGS)
def test_strict_arguments_are_held_when_the_choice_is_free(tags: str) -> None:
    call = FORCED_CALLS["hermes"]
    assert goes("hermes", f"Looking.\n{call}", tags, tools=STRICT)
    assert goes("hermes", "No need to look.", tags, tools=STRICT)
    assert not goes("hermes", f"Looking.\n{call.replace('3', 'null')}", tags, tools=STRICT)
    assert not goes("hermes", call.replace('"at"', '"up"'), tags, tools=STRICT)
    assert goes("llama", FORCED_CALLS["llama"], tags, tools=STRICT)
    assert goes("llama", "No need.", tags, tools=STRICT)
    assert not goes("llama", '{"answer"', tags, tools=STRICT)


@pytest.mark.parametrize("family", FORCED_CALLS)
@pytest.mark.parametrize("seed", range(4))
def test_what_a_blind_model_writes_under_a_forced_call_is_read_as_that_call(
    family: str, seed: int
) -> None:
    fmt, words = speaking(family, "added")
    strict = {**AT, "properties": {"at": {"enum": [1, 2]}}, "additionalProperties": False}
    request = ChatRequest(
        ASK,
        tools=(Tool("look", "", strict, strict=True),),
        tool_choice=FORCED,
        parallel_tool_calls=False,
        reasoning_effort="none" if family == "qwen3" else None,
    )
    grammar = fmt.render(request).grammar
    assert grammar is not None
    ids, is_done = wander(grammar, fmt._vocabulary, [words.eos_token_id], seed)  # type: ignore[attr-defined]
    found, reason, _ = read(fmt.parser(request), [ids])
    assert is_done
    assert [name for kind, _, name in found if kind == "call"] == ["look"]
    assert json.loads(joined(found, "arguments"))["at"] in (1, 2)
    assert reason == "tool_calls"


def test_the_schema_is_also_shown_to_the_model() -> None:
    fmt, words = speaking("plain")
    answer = ResponseFormat("json_schema", {"type": "object", "properties": {"zebra": {}}})
    prompt = words.decode(fmt.render(ChatRequest(ASK, response_format=answer)).prompt.ids)
    assert prompt.startswith("<|im_start|>system\n") and "zebra" in prompt
