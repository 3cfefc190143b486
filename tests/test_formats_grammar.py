"""Grammars hold what they must and nothing else: schemas, forced calls, strict arguments."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

import pytest

from serve.errors import EngineFailed, InvalidRequest
from serve.formats.grammar import (
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    GrammarCompiler,
    json_rule,
    supported_keywords,
)
from serve.formats.harmony import HarmonyFormat
from serve.formats.harmony_render import marks_of
from serve.formats.schema_judge import WALL_SECONDS, judge
from serve.formats.vocabulary import Vocabulary
from serve.values import (
    ChatRequest,
    Message,
    ResponseFormat,
    TextPart,
    Tool,
    ToolChoice,
)
from tests.parsing import joined, read
from tests.small_tokenizers import byte_level
from tests.tiny import HARMONY_TOKENS, tiny_tokenizer
from tests.walking import allowed, follow, wander

ASK = [Message("user", (TextPart("x"),))]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "sex": {"enum": ["f", "m", None]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = Tool(
    "get_weather",
    "",
    {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Tokyo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    strict=True,
)
LOOSE = Tool("look", "", {"type": "object", "properties": {"at": {"type": "integer"}}})


@cache
def words() -> Vocabulary:
    return Vocabulary(byte_level())


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(words(), frozenset({words().tokenizer.eos_token_id}))


def may_write(schema: dict[str, Any], text: str) -> bool:
    """Whether the whole of `text` may be written, and an end may follow it."""
    matcher = compiler().compile("start: " + json_rule(schema), param="x").matcher()
    for token in words().encode_plain(text):
        if token not in allowed(matcher, words().size):
            return False
        matcher.accept(token)
    return words().tokenizer.eos_token_id in allowed(matcher, words().size)


# keyword: (schema, what it allows, what it does not)
HELD: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "type": ({"type": "integer"}, 3, "3"),
    "enum": ({"enum": ["a", 1]}, 1, 2),
    "const": ({"const": {"a": [1]}}, {"a": [1]}, {"a": [2]}),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "x"),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 5}]}, 7, 3),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "x", None),
    "$ref": ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}, 3, "x"),
    "$defs": (
        {"$defs": {"n": {"const": 1}}, "items": {"$ref": "#/$defs/n"}, "type": "array"},
        [1],
        [2],
    ),
    "definitions": ({"definitions": {"n": {"const": 1}}, "$ref": "#/definitions/n"}, 1, 2),
    "properties": (
        {"type": "object", "properties": {"a": {"type": "null"}}},
        {"a": None},
        {"a": 1},
    ),
    "required": ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, {"a": 1}, {}),
    "additionalProperties": (
        {"type": "object", "additionalProperties": {"const": 1}},
        {"z": 1},
        {"z": 2},
    ),
    "patternProperties": (
        {
            "type": "object",
            "patternProperties": {"^a+$": {"const": 1}},
            "additionalProperties": False,
        },
        {"aa": 1},
        {"b": 1},
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, {"a": 1}, {}),
    "maxProperties": ({"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    "items": ({"type": "array", "items": {"type": "integer"}}, [1, 2], ["x"]),
    "prefixItems": ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, [1], [2]),
    "minItems": ({"type": "array", "minItems": 2}, [1, 2], [1]),
    "maxItems": ({"type": "array", "maxItems": 1}, [1], [1, 2]),
    "minLength": ({"type": "string", "minLength": 2}, "ab", "a"),
    "maxLength": ({"type": "string", "maxLength": 2}, "ab", "abc"),
    "pattern": ({"type": "string", "pattern": "^a+$"}, "aa", "b"),
    "format": ({"type": "string", "format": "date"}, "2025-06-28", "today"),
    "minimum": ({"type": "integer", "minimum": 3}, 3, 2),
    "maximum": ({"type": "integer", "maximum": 3}, 3, 4),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, 4, 3),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 3}, 2, 3),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, 14, 15),
}
FORMATS = {
    "date-time": "2025-06-28T10:00:00Z",
    "time": "10:00:00Z",
    "date": "2025-06-28",
    "duration": "P1D",
    "email": "a@b.org",
    "hostname": "example.org",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
    "uri": "https://example.org/x",
}


@pytest.mark.parametrize("keyword", supported_keywords()["keywords"])
def test_every_keyword_that_readme_lists_is_held(keyword: str) -> None:
    schema, good, bad = HELD[keyword]
    assert keyword in json.dumps(schema)
    compiler().check(schema, "x")
    assert may_write(schema, json.dumps(good))
    assert not may_write(schema, json.dumps(bad))


@pytest.mark.parametrize("name", supported_keywords()["format"])
def test_every_string_format_that_readme_lists_is_held(name: str) -> None:
    schema = {"type": "string", "format": name}
    assert may_write(schema, json.dumps(FORMATS[name]))
    assert not may_write(schema, '"no such thing!"')


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "if": {}, "then": {}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "object", "propertyNames": {}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {}}, "dependentRequired"),
        ({"type": "string", "format": "regex"}, "regex"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "oneOf"),
        ({"type": "wrong"}, "wrong"),
        ({"$ref": "https://example.org/x"}, "example.org"),
        ({"enum": ["x" * MAX_SCHEMA_BYTES]}, "bytes"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(schema: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word) as refused:
        compiler().check(schema, "response_format.json_schema.schema")
    assert refused.value.param == "response_format.json_schema.schema"
    assert "state>" not in refused.value.message and "/" not in refused.value.message.replace(
        "https://example.org/x", ""
    )


def test_a_schema_may_be_so_deep_and_no_deeper() -> None:
    def nested(levels: int) -> dict[str, Any]:
        inner: dict[str, Any] = {"type": "string"}
        for _ in range(levels - 1):
            inner = {"type": "object", "properties": {"a": inner}}
        return inner

    compiler().check(nested(MAX_SCHEMA_DEPTH), "x")
    for levels in (MAX_SCHEMA_DEPTH + 2, 500, 5000):
        with pytest.raises(InvalidRequest, match=r"deep|no JSON"):
            compiler().check(nested(levels), "x")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 99999989},
        {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrst"]},
    ],
)
def test_a_schema_that_would_keep_a_compiler_busy_is_refused_in_time(
    schema: dict[str, Any],
) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match="too long"):
        compiler().check(schema, "tools[0].function.parameters")
    assert time.monotonic() - began < WALL_SECONDS + 5
    began = time.monotonic()
    with pytest.raises(InvalidRequest):
        compiler().check(schema, "tools[0].function.parameters")  # asked again, it is known
    assert time.monotonic() - began < 1


def test_plain_schemas_are_judged_without_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.formats.schema_judge.subprocess", None)
    assert judge(json.dumps(PERSON)) == ""
    assert "wrong" in judge('{"type": "wrong"}')


def test_annotations_are_no_constraints() -> None:
    schema = {"type": "integer", "title": "T", "description": "d", "default": 1, "examples": [1]}
    assert may_write(schema, "5")


def test_whitespace_is_bounded_so_that_a_model_cannot_fill_its_budget_with_it() -> None:
    assert may_write({"type": "object"}, '{\n    "a": [1,\n    2]\n}')
    assert not may_write({"type": "object"}, "{" + " " * 200 + "}")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_blind_model_writes_fits_the_schema(seed: int) -> None:
    grammar = compiler().compile("start: " + json_rule(PERSON), param="x")
    ids, is_done = wander(grammar, words(), [words().tokenizer.eos_token_id], seed)
    if is_done:
        found = json.loads(words().decode(ids))
        assert isinstance(found["name"], str) and len(found["name"]) <= 8
        assert 0 <= found["age"] <= 150 and set(found) <= {"name", "age", "sex"}
        assert found.get("sex", "f") in ("f", "m", None)


def test_each_sequence_starts_its_own_matcher() -> None:
    grammar = compiler().compile("start: " + json_rule({"enum": [True, False]}), param="x")
    first, second = grammar.matcher(), grammar.matcher()
    for token in words().encode_plain("true"):
        first.accept(token)
    assert first.is_finished() and not second.is_finished()
    assert compiler().compile("start: " + json_rule({"enum": [True, False]}), param="x") is grammar


def test_a_wrong_id_only_ends_its_own_sequence() -> None:
    grammar = compiler().compile("start: " + json_rule({"type": "integer"}), param="x")
    matcher = grammar.matcher()
    with pytest.raises(EngineFailed):
        matcher.accept(words().encode_plain("x")[0])
    with pytest.raises(EngineFailed):
        allowed(matcher, words().size)
    assert allowed(grammar.matcher(), words().size)


def test_a_pattern_that_explodes_fails_its_sequence_in_bounded_time() -> None:
    schema = {"type": "string", "pattern": "((a{0,100}){0,100}){0,100}"}
    matcher = compiler().compile("start: " + json_rule(schema), param="x").matcher()
    began = time.monotonic()
    with pytest.raises(EngineFailed) as failed:
        for token in words().encode_plain('"' + "a" * 60):
            allowed(matcher, words().size)
            matcher.accept(token)
    assert time.monotonic() - began < 20
    assert "aaa" not in failed.value.message


# -- Harmony ---------------------------------------------------------------------------------------


@cache
def harmony() -> HarmonyFormat:
    vocabulary = Vocabulary(tiny_tokenizer(HARMONY_TOKENS, None, eos="<|return|>"))
    marks = marks_of(vocabulary)
    assert marks is not None
    return HarmonyFormat(vocabulary, marks)


FINAL = "<|channel|>final<|message|>"
THOUGHT = '<|channel|>analysis<|message|>Hm, "free" text.<|end|><|start|>assistant'
PREAMBLE = "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
LOOK = "<|channel|>commentary to=functions.look <|constrain|>json<|message|>"


def goes(text: str, *, ends: bool = True, **options: Any) -> bool:
    """Whether the answer `text` may be written, and (if `ends`) finished there."""
    grammar = harmony().render(ChatRequest(ASK, **options)).grammar
    assert grammar is not None
    vocabulary = harmony()._vocabulary
    ids = vocabulary.encode(text)
    passed, is_finished = follow(grammar, vocabulary, ids)
    return passed == len(ids) and (is_finished or not ends)


def test_nothing_binds_a_plain_answer_or_free_calls() -> None:
    assert harmony().render(ChatRequest(ASK)).grammar is None
    assert harmony().render(ChatRequest(ASK, tools=(LOOK_TOOL := LOOSE,))).grammar is None
    forced_none = ChatRequest(ASK, tools=(CITY,), tool_choice=ToolChoice("none"))
    assert harmony().render(forced_none).grammar is None
    assert LOOK_TOOL.strict is False


def test_a_response_format_binds_the_final_answer_only() -> None:
    answer = ResponseFormat("json_schema", PERSON, strict=True)
    good = '{"name": "Ann", "age": 3}'
    assert goes(FINAL + good, response_format=answer)
    assert goes(THOUGHT + THOUGHT + FINAL + good, response_format=answer)
    assert not goes(THOUGHT + FINAL + '{"name": 3', ends=False, response_format=answer)
    assert not goes(THOUGHT + FINAL + "Sure", ends=False, response_format=answer)
    assert not goes(THOUGHT + PREAMBLE, ends=False, response_format=answer)


def test_json_object_is_any_json_object() -> None:
    answer = ResponseFormat("json_object")
    assert goes(THOUGHT + FINAL + '{"a": [1, {"b": null}]}', response_format=answer)
    assert not goes(FINAL + "[1]", ends=False, response_format=answer)


@pytest.mark.parametrize("names", [(), ("get_weather",)])
def test_a_required_call_is_made_after_free_reasoning(names: tuple[str, ...]) -> None:
    forced = {"tools": (CITY, LOOSE), "tool_choice": ToolChoice("required", names)}
    assert goes(THOUGHT + PREAMBLE + CALL + '{"city": "Paris"}', **forced)
    assert goes(CALL + '{"city": "Paris"}', **forced)
    assert not goes(THOUGHT + FINAL, ends=False, **forced)
    assert not goes(CALL + '{"city": "Rome', ends=False, **forced)
    assert goes(LOOK + '{"at": 3}', **forced) == (not names)
    assert not goes(CALL.replace("get_weather", "launch"), ends=False, **forced)
    assert not goes("<|channel|>analysis<|message|>Done.<|return|>", ends=False, **forced)


def test_strict_arguments_are_held_and_others_are_free_when_the_choice_is_free() -> None:
    tools = {"tools": (CITY, LOOSE)}
    assert goes(THOUGHT + CALL + '{"city": "Tokyo"}', **tools)
    assert not goes(CALL + '{"city": 3', ends=False, **tools)
    assert goes(LOOK + "whatever it writes", ends=False, **tools)
    assert goes(THOUGHT + FINAL + "No need.", ends=False, **tools)


def test_forced_arguments_of_a_loose_tool_are_held_as_far_as_its_schema_can_be() -> None:
    odd = Tool("odd", "", {"type": "object", "properties": {"at": {"type": "integer"}}, "not": {}})
    none = Tool("none", "", None)
    broken = Tool("broken", "", {"type": "nonsense"})
    for tool, arguments in ((odd, '{"at": 3}'), (none, '{"x": 1}'), (broken, '{"x": 1}')):
        head = CALL.replace("get_weather", tool.name)
        options = {"tools": (tool,), "tool_choice": ToolChoice("required")}
        assert goes(head + arguments, **options)
        assert not goes(head + "text", ends=False, **options)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tool_choice": ToolChoice("required")}, "tool_choice"),
        ({"tools": (CITY,), "tool_choice": ToolChoice("auto", ("nope",))}, "tool_choice"),
        (
            {"response_format": ResponseFormat("json_schema", {"not": {}})},
            "response_format.json_schema.schema",
        ),
        (
            {"tools": (LOOSE, Tool("t", "", {"type": "object", "not": {}}, strict=True))},
            "tools[1].function.parameters",
        ),
    ],
)
def test_choices_and_schemas_that_cannot_be_met_are_refused(
    options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        harmony().render(ChatRequest(ASK, **options))
    assert refused.value.param == param


@pytest.mark.parametrize("seed", range(12))
def test_what_a_blind_model_writes_under_a_forced_call_is_read_as_that_call(seed: int) -> None:
    request = ChatRequest(ASK, tools=(CITY,), tool_choice=ToolChoice("required", ("get_weather",)))
    rendered = harmony().render(request)
    assert rendered.grammar is not None
    vocabulary = harmony()._vocabulary
    ids, is_done = wander(rendered.grammar, vocabulary, sorted(rendered.stop_ids), seed, limit=300)
    told, reason, _ = read(harmony().parser(request), [ids])
    if is_done:
        assert [name for kind, _, name in told if kind == "call"] == ["get_weather"]
        assert json.loads(joined(told, "arguments"))["city"] in ("Paris", "Tokyo")
        assert reason == "tool_calls"
