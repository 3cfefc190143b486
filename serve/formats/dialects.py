"""How the common model families write reasoning and tool calls, one table entry each.

A model's entry is told from its chat template's text (`reasoning_of`, `calls_of`), never from its
name. Reading is in tag_parse.py, what binds an answer in dialect_grammar.py. Knows no tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The tags around a model's reasoning."""

    opens: str
    closes: str


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls are written. A grammar writes one as `opens` + `before` + name + `between` +
    arguments + `after` + `closes`; reading is wider (json_calls.py, xml_calls.py)."""

    name: str
    opens: str
    before: str
    between: str
    after: str
    closes: str = ""
    kind: Literal["json", "bare", "xml"] = "json"


REASONING = (
    Reasoning("<think>", "</think>"),
    Reasoning("[THINK]", "[/THINK]"),
    Reasoning("<seed:think>", "</seed:think>"),
    Reasoning("<|START_THINKING|>", "<|END_THINKING|>"),
)

HERMES = CallSyntax(
    "hermes", "<tool_call>", '\n{"name": "', '", "arguments": ', "}\n", "</tool_call>"
)
QWEN_XML = CallSyntax(
    "qwen-xml", "<tool_call>", "\n<function=", ">\n", "</function>\n", "</tool_call>", "xml"
)
SEED_XML = CallSyntax(
    "seed-xml",
    "<seed:tool_call>",
    "\n<function=",
    ">\n",
    "</function>\n",
    "</seed:tool_call>",
    "xml",
)
MISTRAL = CallSyntax("mistral", "[TOOL_CALLS]", '[{"name": "', '", "arguments": ', "}]")
MISTRAL_ARGS = CallSyntax("mistral-args", "[TOOL_CALLS]", "", "[ARGS]", "")
LLAMA = CallSyntax("llama", "", '{"name": "', '", "parameters": ', "}", kind="bare")
PLAIN = CallSyntax("json", "", '{"name": "', '", "arguments": ', "}", kind="bare")

# Asked in order; the first that fits a template which writes tools is the model's.
_SIGNS: tuple[tuple[CallSyntax, Callable[[str], bool]], ...] = (
    (SEED_XML, lambda text: "<seed:tool_call>" in text and "<function=" in text),
    (QWEN_XML, lambda text: "<tool_call>" in text and "<function=" in text),
    (HERMES, lambda text: "<tool_call>" in text and _shows_object(text, "arguments")),
    (MISTRAL_ARGS, lambda text: "[TOOL_CALLS]" in text and "[ARGS]" in text),
    (MISTRAL, lambda text: "[TOOL_CALLS]" in text),
    (LLAMA, lambda text: _shows_object(text, "parameters")),
    (PLAIN, lambda text: _shows_object(text, "arguments")),
)


def _shows_object(template: str, key: str) -> bool:
    """Whether a template writes, or shows the model, {"name": …, "<key>": …}."""
    return re.search(rf'\{{\\?"name\\?":.{{0,200}}?\\?"{key}\\?":', template, re.DOTALL) is not None


def reasoning_of(template: str) -> Reasoning | None:
    """The tags that a template itself speaks of."""
    return next((t for t in REASONING if t.opens in template or t.closes in template), None)


def calls_of(template: str) -> CallSyntax | None:
    """The syntax of a template that writes tools; None: not one that is known here."""
    return next((syntax for syntax, fits in _SIGNS if fits(template)), None)
