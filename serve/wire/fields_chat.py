"""The fields of POST /v1/chat/completions. Checked by a test against the official SDK's types."""

from __future__ import annotations

from serve.wire import bounds
from serve.wire.fields import ANY, ARRAY, FLAG, OBJECT, TEXT, Field, number, one_of, whole
from serve.wire.options import EFFORTS
from serve.wire.sampling import MOST_TOKENS

NO_AUDIO = "this server speaks text"
NO_STORE = "there is no hosted service behind this server"

SAMPLING: tuple[Field, ...] = (
    Field("temperature", "honoured", "0 to 2; 0 is greedy", number(0, 2)),
    Field("top_p", "honoured", "0 to 1", number(0, 1)),
    Field("frequency_penalty", "honoured", "-2 to 2", number(-2, 2)),
    Field("presence_penalty", "honoured", "-2 to 2", number(-2, 2)),
    Field("logit_bias", "honoured", "token id to -100…100", OBJECT),
    Field("seed", "honoured", "the same request gives the same tokens, whatever else runs",
          whole(-(2**63), 2**63 - 1)),
    Field("stop", "honoured", "a string or up to 16; in the final text only, never part of it"),
)  # fmt: skip

EXTRAS: tuple[Field, ...] = (
    Field("top_k", "honoured", "0 or -1 is off", whole(-1, 1_000_000), is_extra=True),
    Field("min_p", "honoured", "0 to 1", number(0, 1), is_extra=True),
    Field("repetition_penalty", "honoured", "1 is off", number(0.01, 10), is_extra=True),
    Field("min_tokens", "honoured", "no end before so many", whole(0, MOST_TOKENS), is_extra=True),
    Field("ignore_eos", "honoured", "go on to max tokens", FLAG, is_extra=True),
    Field("stop_token_ids", "honoured", "ids that end the answer", ARRAY, is_extra=True),
)

CHAT: tuple[Field, ...] = (
    Field("messages", "honoured", "system, developer, user, assistant, tool; text and images",
          ANY),
    Field("model", "honoured", "the served model's id, `default` or `gpt-oss:20b`", TEXT),
    Field("stream", "honoured", "server-sent events, ended by `[DONE]`", FLAG),
    Field("stream_options", "honoured", "include_usage", OBJECT),
    Field("max_completion_tokens", "honoured", "reasoning counts", whole(1, MOST_TOKENS)),
    Field("max_tokens", "honoured", "the older name of max_completion_tokens",
          whole(1, MOST_TOKENS)),
    Field("n", "honoured", "1 to 8", whole(1, bounds.CHOICES.most)),
    *SAMPLING,
    Field("logprobs", "honoured", "of content tokens", FLAG),
    Field("top_logprobs", "honoured", "0 to 20; needs logprobs", whole(0, 20)),
    Field("tools", "honoured", "functions, nested or flat; custom tools and namespaces become "
          "functions; kinds only a hosted service has are skipped", ARRAY),
    Field("tool_choice", "honoured", "none, auto, required, a function, allowed_tools"),
    Field("parallel_tool_calls", "honoured", "false: one call at most", FLAG),
    Field("response_format", "honoured", "text, json_object, json_schema", OBJECT),
    Field("reasoning_effort", "honoured", "mapped to what the model has", one_of(*EFFORTS)),
    Field("verbosity", "honoured", "low and high add one sentence to the instructions",
          one_of("low", "medium", "high")),
    Field("metadata", "harmless", "checked and returned", OBJECT),
    Field("user", "harmless", "accepted, no effect", TEXT),
    Field("safety_identifier", "harmless", "accepted, no effect", TEXT),
    Field("prompt_cache_key", "harmless", "the prefix cache works by itself, per key", TEXT),
    Field("prompt_cache_options", "harmless", "the prefix cache works by itself", OBJECT),
    Field("prompt_cache_retention", "harmless", "the prefix cache works by itself", TEXT),
    Field("service_tier", "harmless", "there is one tier", TEXT),
    Field("prediction", "harmless", "a hint for speed; answers are the same without", OBJECT),
    Field("store", "refused", "chat completions are not kept; use /v1/responses", FLAG, (False,)),
    Field("audio", "refused", NO_AUDIO),
    Field("modalities", "refused", NO_AUDIO, ARRAY, (["text"],)),
    Field("functions", "refused", "use tools", ARRAY, ([],)),
    Field("function_call", "refused", "use tool_choice", ANY, ("auto", "none")),
    Field("moderation", "refused", NO_STORE),
    Field("web_search_options", "refused", NO_STORE),
    *EXTRAS,
    Field("reasoning", "honoured", "`{\"effort\": …}`", OBJECT, is_extra=True),
    Field("chat_template_kwargs", "honoured", "reasoning_effort, enable_thinking", OBJECT,
          is_extra=True),
    Field("enable_thinking", "honoured", "the same, at the top", FLAG, is_extra=True),
    Field("continue_final_message", "honoured", "go on with a last assistant turn", FLAG,
          is_extra=True),
    Field("add_generation_prompt", "honoured", "false only with continue_final_message", FLAG,
          is_extra=True),
    Field("input", "honoured", "a Responses body on this route is understood; the answer is "
          "a chat completion", is_extra=True),
)  # fmt: skip
