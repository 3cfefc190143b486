"""The fields of POST /v1/completions. Checked by a test against the official SDK's types."""

from __future__ import annotations

from serve.wire import bounds
from serve.wire.fields import FLAG, OBJECT, TEXT, Field, whole
from serve.wire.fields_chat import EXTRAS, SAMPLING
from serve.wire.sampling import MOST_TOKENS

COMPLETIONS: tuple[Field, ...] = (
    Field("prompt", "honoured", "a string, token ids, or up to 32 of either"),
    Field("model", "honoured", "the served model's id, `default` or `gpt-oss:20b`", TEXT),
    Field("max_tokens", "honoured", "default 16, as OpenAI's", whole(1, MOST_TOKENS)),
    Field("n", "honoured", "1 to 8 for each prompt", whole(1, bounds.CHOICES.most)),
    Field("stream", "honoured", "server-sent events, ended by `[DONE]`", FLAG),
    Field("stream_options", "honoured", "include_usage", OBJECT),
    Field("logprobs", "honoured", "0 to 20 alternatives", whole(0, bounds.TOP_LOGPROBS.most)),
    Field("echo", "honoured", "a text prompt, without logprobs", FLAG),
    *SAMPLING,
    Field("user", "harmless", "accepted, no effect", TEXT),
    Field("best_of", "refused", "use n and choose", whole(1, 1), (1,)),
    Field("suffix", "refused", "no served model fills in the middle", TEXT, ("",)),
    *EXTRAS,
)
