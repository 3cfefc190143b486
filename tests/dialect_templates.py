"""Small chat templates that write as the common families do, and tokenizers that speak them."""

from __future__ import annotations

from functools import cache

from tests.small_tokenizers import byte_level

_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}CALL{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}"
)
_TOOLS = "{% if tools %}<|im_start|>system\nSYNTAX{{ tools | tojson }}<|im_end|>\n{% endif %}"


def template(syntax: str = "", opening: str = "", call: str = "") -> str:
    tools = _TOOLS.replace("SYNTAX", syntax) if syntax else ""
    return tools + _TURNS.replace("OPENING", opening).replace("CALL", call)


HERMES = '<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'
XML = "<tool_call>\n<function=example>\n<parameter=key>\nvalue\n</parameter>\n</function>\n"
QWEN_THINK = (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)

TEMPLATES = {
    "qwen3": template(HERMES, QWEN_THINK, "<tool_call>"),
    "r1": template("", "<think>\n"),
    "hermes": template(HERMES),
    "xml": template(XML),
    "llama": template('{"name": function name, "parameters": dictionary}. <|python_tag|>'),
    "mistral": template("[AVAILABLE_TOOLS]", "", "[TOOL_CALLS]"),
    "mistral-args": template("[AVAILABLE_TOOLS]", "", "[TOOL_CALLS]name[ARGS]"),
    "json": template('Call with {"name": ..., "arguments": ...}'),
    "plain": template(),
}
# Tags that are one token of their own in some vocabularies, and spelled out in others.
TAGS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
)


@cache
def tokenizer(name: str, tags: str = "spelled"):  # type: ignore[no-untyped-def]
    """`tags`: "spelled" out in pieces, one "added" token each, or a "special" token each."""
    made = byte_level(TEMPLATES[name], TAGS if tags == "added" else ())
    if tags == "special":
        import copy

        from transformers import AddedToken

        made = copy.deepcopy(made)
        made.add_tokens([AddedToken(t, special=True) for t in TAGS], special_tokens=True)
    return made
