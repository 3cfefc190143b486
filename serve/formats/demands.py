"""What a request demands of any format, checked once: messages, tools, choices, template arguments.

Knows no syntax. Used by harmony.py and template.py.
"""

from __future__ import annotations

from typing import Any

from serve.errors import InvalidRequest, Unsupported
from serve.formats.vocabulary import Vocabulary
from serve.values import ChatRequest, Effort, Tool

# Every effort that a request may name, as the three levels that models are trained on.
EFFORTS: dict[Effort, str] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
ALLOWED_OPTIONS = ("reasoning_effort", "enable_thinking")


def check_demands(request: ChatRequest, *, sees: bool = False) -> None:
    """Raises InvalidRequest or Unsupported naming the field."""
    if not request.messages:
        raise InvalidRequest("At least one message is needed.", param="messages")
    pictures = [part for message in request.messages for part in message.images]
    if pictures and not sees:
        raise Unsupported(
            "This model reads text only: leave the images out, or ask a model that sees.",
            param=pictures[0].where or "messages",
        )
    last = request.messages[-1]
    if request.continue_final_message and (last.role != "assistant" or last.tool_calls):
        raise InvalidRequest(
            "To continue a message, the last one must be the assistant's and call no tool.",
            param="continue_final_message",
        )
    _check_tool_choice(request)


def _check_tool_choice(request: ChatRequest) -> None:
    """A choice must be one that the declared tools can satisfy."""
    choice = request.tool_choice
    declared = [tool.name for tool in request.tools]
    missing = [name for name in choice.names if name not in declared]
    if missing:
        raise InvalidRequest(
            f"tool_choice names {missing[0]!r}, which is not among the tools.", param="tool_choice"
        )
    if choice.mode == "required" and not declared:
        raise InvalidRequest("tool_choice needs tools to choose from.", param="tool_choice")
    if request.continue_final_message and (
        choice.mode == "required" or request.response_format.kind != "text"
    ):
        raise InvalidRequest(
            "A message begun cannot be continued under a response format or a forced call.",
            param="continue_final_message",
        )


def tools_shown(request: ChatRequest) -> tuple[Tool, ...]:
    """The tools that the model may call: none with tool_choice "none", the named ones where it
    names some."""
    choice = request.tool_choice
    if choice.mode == "none":
        return ()
    if choice.names:
        return tuple(tool for tool in request.tools if tool.name in choice.names)
    return request.tools


def allowed_options(request: ChatRequest) -> dict[str, Any]:
    """The request's own template arguments, checked against the allow-list."""
    for name in request.template_options:
        if name not in ALLOWED_OPTIONS:
            raise InvalidRequest(
                f"Template argument {name!r} is not taken; allowed: {', '.join(ALLOWED_OPTIONS)}.",
                param=f"chat_template_kwargs.{name}",
            )
    return dict(request.template_options)


def raw_prompt(vocabulary: Vocabulary, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
    """Ids of a raw prompt; given ids are checked against the vocabulary."""
    if not isinstance(prompt, str):
        wrong = next((i for i in prompt if not 0 <= i < vocabulary.size), None)
        if wrong is not None:
            raise InvalidRequest(
                f"Token id {wrong} is not in the vocabulary (0 to {vocabulary.size - 1}).",
                param="prompt",
            )
        ids = list(prompt)
    else:
        ids = vocabulary.encode(prompt, begin=True)
        if not ids and vocabulary.tokenizer.bos_token_id is not None:
            ids = [int(vocabulary.tokenizer.bos_token_id)]
    if not ids:
        raise InvalidRequest("The prompt is empty: give at least one token.", param="prompt")
    return tuple(ids)
