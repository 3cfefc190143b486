"""What may come next: JSON Schemas and structures compiled to token masks for the engine.

Grammars are written in llguidance's dialect of Lark, by the format that knows the structure; here
they are checked, compiled on the model's own vocabulary and kept for the next request with the same
one. A schema that cannot be held exactly is refused by name, never loosened. Knows no roles and no
HTTP. Used by harmony_grammar.py and dialect_grammar.py; the engine's thread uses the matchers.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any

import llguidance

from serve.engine.face import Grammar, Matcher
from serve.errors import EngineFailed, InvalidRequest
from serve.formats.schema_judge import LIMITS, judge
from serve.formats.vocabulary import Vocabulary
from serve.values import JSONObject

MAX_SCHEMA_BYTES = 256 * 1024
MAX_SCHEMA_DEPTH = 32
KEPT_GRAMMARS = 64

# Whitespace inside JSON is bounded: a model that has nothing to say would fill its budget with it.
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
# Any text without control tokens.
TEXT = r"TEXT: /(.|\n)*/"

KEYWORDS = (
    "type", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "$defs", "definitions",
    "properties", "required", "additionalProperties", "patternProperties",
    "minProperties", "maxProperties",
    "items", "prefixItems", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
)  # fmt: skip
STRING_FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip


def supported_keywords() -> dict[str, tuple[str, ...]]:
    """For README: the JSON Schema keywords that are held, and the values of `format`."""
    return {"keywords": KEYWORDS, "format": STRING_FORMATS}


class GrammarCompiler:
    """One per model. The vocabulary's index is built at first use: seconds for 200,000 ids."""

    def __init__(self, vocabulary: Vocabulary, end_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._end_ids = sorted(end_ids)
        self._index: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[str, _Compiled] = OrderedDict()
        self._judged: OrderedDict[str, str] = OrderedDict()
        self._lock = Lock()
        self._judging = Lock()

    def warm(self) -> None:
        """Build the index now instead of at the first request that needs it."""
        with self._lock:
            self._indexed()

    def check(self, schema: JSONObject, param: str) -> None:
        """Refuse a schema that cannot be held, naming the keyword: too large, too deep, too slow to
        prepare, not supported."""
        written = _written(schema, param)
        with self._judging:
            told = self._judged.get(written)
        if told is None:
            told = judge(written)  # beside other requests: it may take seconds
            with self._judging:
                self._judged[written] = told
                if len(self._judged) > KEPT_GRAMMARS:
                    self._judged.popitem(last=False)
        if told:
            raise InvalidRequest(_said(told), param=param)

    def can_hold(self, schema: JSONObject) -> bool:
        """Whether `json_rule(schema, lenient=True)` would compile."""
        try:
            self.check({**schema, "x-guidance": {"lenient": True}}, "")
        except InvalidRequest:
            return False
        return True

    def compile(self, lark: str, *, param: str) -> Grammar:
        """A grammar of the whole answer. Raises InvalidRequest naming `param` when what the request
        brought (a schema, a pattern) cannot be held or grows too large."""
        with self._lock:
            if lark in self._kept:
                self._kept.move_to_end(lark)
                return self._kept[lark]
            limits = llguidance.LLParserLimits(**LIMITS)
            source = llguidance.LLMatcher.grammar_from_lark(lark)
            made = llguidance.LLMatcher(self._indexed(), source, log_level=0, limits=limits)
            if made.is_error():
                raise InvalidRequest(_said(made.get_error()), param=param)
            self._kept[lark] = _Compiled(made, -(-self._vocabulary.size // 32))
            if len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
            return self._kept[lark]

    def _indexed(self) -> llguidance.LLTokenizer:
        if self._index is None:
            wrapper = llguidance.TokenizerWrapper(_Words(self._vocabulary, self._end_ids[0]))
            size = self._vocabulary.size
            self._index = llguidance.LLTokenizer(wrapper, n_vocab=size, eos_token=self._end_ids)
        return self._index

    def literal(self, text: str) -> str:
        """`text` as Lark: control tokens by id, what lies between them as strings."""
        names = [
            re.escape(str(self._vocabulary.tokenizer.convert_ids_to_tokens(i)))
            for i in self._vocabulary.control_ids
        ]
        pieces = re.split(f"({'|'.join(sorted(names, key=len, reverse=True))})", text)
        written = []
        for i, piece in enumerate(pieces):
            if i % 2:
                written.append(f"<[{self._vocabulary.id_of(piece)}]>")
            elif piece:
                written.append(json.dumps(piece, ensure_ascii=False))
        return " ".join(written)


def json_rule(schema: JSONObject | None, *, lenient: bool = False) -> str:
    """A schema as a Lark term; None is any JSON object. `lenient`: keywords that cannot be held are
    passed over, for arguments that nobody asked to be held to their schema."""
    options = {**_JSON_OPTIONS, **({"lenient": True} if lenient else {})}
    body = {**(schema or {"type": "object"}), "x-guidance": options}
    return "%json " + json.dumps(body, ensure_ascii=True)


def _written(schema: JSONObject, param: str) -> str:
    """The schema as JSON, of bounded size and depth."""
    try:
        written = json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest("The schema is no JSON.", param=param) from None
    if len(written) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"The schema has {len(written)} bytes; at most {MAX_SCHEMA_BYTES} are taken.",
            param=param,
        )
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(
            f"The schema is nested deeper than {MAX_SCHEMA_DEPTH} levels.", param=param
        )
    return written


def _depth(schema: Any) -> int:
    deepest, level = 0, [schema]
    while level and deepest <= MAX_SCHEMA_DEPTH * 3:
        deepest += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list)
        ]
    # Every level of a schema is two of JSON: the keyword's object and the subschema's.
    return (deepest + 1) // 2


def _said(error: str) -> str:
    """llguidance's error as a sentence for the caller, its inner state left out."""
    unknown = re.search(r"Unimplemented keys: \[(.*?)\]", error)
    if unknown is not None:
        names = unknown[1].replace('"', "")
        return f"The schema uses {names}, which cannot be held here. Leave it out."
    if "oneOf" in error:
        return "The schema uses oneOf with branches that overlap, which cannot be held: use anyOf."
    line = error.split("\n<state>")[0].strip()
    return f"The schema cannot be held: {' '.join(line.split())[:300]}"


class _Words:
    """The vocabulary as llguidance wants it. It tokenizes forced text on the engine's thread."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.special_token_ids = sorted(vocabulary.control_ids)
        self.tokens = [vocabulary.bytes_of(token) for token in range(vocabulary.size)]
        self._encode = vocabulary.encode_plain

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._encode(text)


class _Compiled:
    """A compiled grammar; each sequence gets a copy of its start."""

    def __init__(self, start: llguidance.LLMatcher, words: int) -> None:
        self._start = start
        self._words = words

    def matcher(self) -> Matcher:
        return _Matcher(self._start.deep_copy(), self._words)


class _Matcher:
    """Raises EngineFailed once the grammar cannot be followed further, which ends its request."""

    def __init__(self, inner: llguidance.LLMatcher, words: int) -> None:
        self._inner = inner
        self._words = words

    def fill(self, bitmask: Any, row: int) -> bool:
        target = bitmask[row]
        if len(target) != self._words:  # a wider row than the vocabulary: what is beyond is never
            target[self._words :] = 0
            target = target[: self._words]
        self._inner.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        if self._inner.is_error():
            raise self._failed()
        return True

    def accept(self, token: int) -> None:
        if not self._inner.consume_token(token):
            raise self._failed()

    def is_finished(self) -> bool:
        return bool(self._inner.is_stopped())

    def _failed(self) -> EngineFailed:
        reason = " ".join(self._inner.get_error().split("<")[0].split())
        return EngineFailed(f"The answer could not be held to its grammar further: {reason[:200]}")
