"""The fields of POST /v1/responses. Checked by a test against the official SDK's types."""

from __future__ import annotations

from serve.wire.fields import ANY, ARRAY, FLAG, OBJECT, TEXT, Field, one_of, whole
from serve.wire.fields_chat import EXTRAS, NO_AUDIO, NO_STORE, SAMPLING
from serve.wire.options import EFFORTS
from serve.wire.sampling import MOST_TOKENS

RESPONSES: tuple[Field, ...] = (
    Field("input", "honoured", "a string or items: messages, reasoning, function_call, "
          "function_call_output, custom_tool_call and its output; others are left out"),
    Field("model", "honoured", "the served model's id, `default` or `gpt-oss:20b`", TEXT),
    Field("instructions", "honoured", "a system message before the input", TEXT),
    Field("previous_response_id", "honoured", "goes on from a stored response of the same key",
          TEXT),
    Field("store", "honoured", "default true: kept for 30 days, within bounds", FLAG),
    Field("stream", "honoured", "server-sent events", FLAG),
    Field("stream_options", "harmless", "chunks are never padded", OBJECT),
    Field("max_output_tokens", "honoured", "reasoning counts", whole(1, MOST_TOKENS)),
    Field("reasoning", "honoured", "effort; no summaries are made: the reasoning itself is in "
          "content", OBJECT),
    Field("text", "honoured", "format (text, json_object, json_schema), verbosity", OBJECT),
    Field("tools", "honoured", "function and custom tools and namespaces of them; kinds only a "
          "hosted service has are skipped", ARRAY),
    Field("tool_choice", "honoured", "none, auto, required, a function, allowed_tools"),
    Field("parallel_tool_calls", "honoured", "false: one call at most", FLAG),
    Field("include", "honoured", "reasoning.encrypted_content, message.output_text.logprobs; "
          "what names hosted tools has nothing to include", ARRAY),
    Field("top_logprobs", "honoured", "0 to 20", whole(0, 20)),
    Field("truncation", "honoured", "auto drops the oldest turns that do not fit",
          one_of("auto", "disabled")),
    Field("temperature", "honoured", "0 to 2; 0 is greedy", SAMPLING[0].schema),
    Field("top_p", "honoured", "0 to 1", SAMPLING[1].schema),
    Field("metadata", "harmless", "checked and returned", OBJECT),
    Field("max_tool_calls", "harmless", "counts hosted tools; there are none",
          whole(1, MOST_TOKENS)),
    Field("user", "harmless", "recorded and returned", TEXT),
    Field("safety_identifier", "harmless", "recorded and returned", TEXT),
    Field("prompt_cache_key", "harmless", "the prefix cache works by itself, per key", TEXT),
    Field("prompt_cache_options", "harmless", "the prefix cache works by itself", OBJECT),
    Field("prompt_cache_retention", "harmless", "the prefix cache works by itself", TEXT),
    Field("service_tier", "harmless", "there is one tier", TEXT),
    Field("background", "refused", "answers are made while the client waits; leave it out", FLAG,
          (False,)),
    Field("background_options", "refused", "there is no background mode"),
    Field("conversation", "refused", "use previous_response_id"),
    Field("prompt", "refused", "there are no stored prompts; send instructions and input"),
    Field("context_management", "refused", "use truncation", ARRAY, ([],)),
    Field("access_programs", "refused", NO_STORE),
    Field("moderation", "refused", NO_STORE),
    Field("image", "refused", NO_AUDIO),
    *(Field(row.name, row.standing, row.says, row.schema, is_extra=True) for row in SAMPLING[2:]),
    *EXTRAS,
    Field("reasoning_effort", "honoured", "as reasoning.effort", one_of(*EFFORTS), is_extra=True),
    Field("chat_template_kwargs", "honoured", "reasoning_effort, enable_thinking", OBJECT,
          is_extra=True),
    Field("enable_thinking", "honoured", "the same, at the top", FLAG, is_extra=True),
    Field("client_metadata", "harmless", "sent by Codex; no effect", ANY, is_extra=True),
)  # fmt: skip
