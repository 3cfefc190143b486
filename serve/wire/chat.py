"""/v1/chat/completions, the asking half, pure: a body to a ChatRequest.

The answering half is chat_answer.py. Knows no HTTP and no tokens. Used by openai_compat.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.errors import InvalidRequest, Unsupported
from serve.values import ChatRequest, Message, ResponseFormat
from serve.wire import fields
from serve.wire.body import Body
from serve.wire.fields_chat import CHAT
from serve.wire.messages import read_messages
from serve.wire.options import (
    read_effort,
    read_format,
    read_metadata,
    read_template_options,
    read_verbosity,
)
from serve.wire.sampling import MOST_TOKENS, read_n, read_sampling, read_top_logprobs
from serve.wire.tools import read_tool_choice, read_tools


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A chat request as it was read: what to ask the service, and how to write the answer."""

    request: ChatRequest
    stream: bool = False
    include_usage: bool = False
    metadata: Mapping[str, str] | None = None
    ignored: tuple[str, ...] = ()


def read(body: Body, tenant: str = "", request_id: str = "") -> ChatCall:
    """Raises InvalidRequest or Unsupported naming the field."""
    fields.check(body, CHAT)
    declared = read_tools(body)
    messages = read_messages(body, declared)
    messages = insert_after_instructions(messages, read_verbosity(body))
    request = ChatRequest(
        messages=messages,
        sampling=read_sampling(
            body, max_tokens=_max_tokens(body), logprobs=_logprobs(body), n=read_n(body)
        ),
        model=body.text("model", 256) or "default",
        tools=declared.tools,
        tool_choice=read_tool_choice(body, declared),
        parallel_tool_calls=body.flag("parallel_tool_calls") is not False,
        response_format=read_format(body, "response_format"),
        reasoning_effort=read_effort(body),
        template_options=read_template_options(body),
        continue_final_message=_continues(body, messages),
        tenant=tenant,
        request_id=request_id,
    )
    check_together(request)
    stream, include_usage = read_stream(body)
    return ChatCall(request, stream, include_usage, read_metadata(body), tuple(body.ignored))


def insert_after_instructions(
    messages: tuple[Message, ...], extra: tuple[Message, ...]
) -> tuple[Message, ...]:
    """`extra` goes behind the leading system and developer messages."""
    start = 0
    while start < len(messages) and messages[start].role in ("system", "developer"):
        start += 1
    return (*messages[:start], *extra, *messages[start:])


def check_together(request: ChatRequest) -> None:
    """What is fine alone but not together."""
    if request.continue_final_message and request.response_format != ResponseFormat():
        raise Unsupported(
            "'continue_final_message' and 'response_format' cannot be used together.",
            param="continue_final_message",
        )


def read_stream(body: Body) -> tuple[bool, bool]:
    """(stream, include_usage)."""
    stream = body.flag("stream") or False
    options = body.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise InvalidRequest(
            "'stream_options' is for streams; set stream to true or leave it out.",
            param="stream_options",
        )
    for name in options.data:
        if name != "include_usage":
            options.ignore(name)
    return stream, options.flag("include_usage") or False


def _max_tokens(body: Body) -> int | None:
    new = body.whole("max_completion_tokens", 1, MOST_TOKENS)
    old = body.whole("max_tokens", 1, MOST_TOKENS)
    if new is not None and old is not None and new != old:
        raise InvalidRequest(
            f"'max_tokens' ({old}) and 'max_completion_tokens' ({new}) differ; send one of them.",
            param="max_tokens",
        )
    return old if new is None else new


def _logprobs(body: Body) -> int | None:
    top = read_top_logprobs(body)
    if body.flag("logprobs"):
        return top or 0
    if top:
        raise InvalidRequest("'top_logprobs' needs logprobs to be true.", param="top_logprobs")
    return None


def _continues(body: Body, messages: tuple[Message, ...]) -> bool:
    wanted = body.flag("continue_final_message") or False
    prompt = body.flag("add_generation_prompt")
    if prompt is False and not wanted:
        raise InvalidRequest(
            "'add_generation_prompt' may be false only with continue_final_message.",
            param="add_generation_prompt",
        )
    if not wanted:
        return False
    last = messages[-1]
    if last.role != "assistant" or last.tool_calls:
        raise InvalidRequest(
            "'continue_final_message' needs a last message of role assistant without tool calls.",
            param="continue_final_message",
        )
    return True
