"""The vocabulary: what a request says and what a model answers, as plain immutable values.

Everybody speaks it: the wire turns JSON into a ChatRequest, the formats turn a ChatRequest into
token ids and token ids into events, the page and the API render the same events. It knows no
HTTP, no tokens, no torch, and imports only the standard library.

One request's events, in order:
    Accepted  Queued*  (TextDelta | ReasoningDelta | ToolCallStarted | ToolCallDelta)*
    ChoiceFinished (one per choice)  then exactly one of  Finished | Failed | Cancelled
A request that is refused has Failed as its only event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from serve.errors import ServeError

Role = Literal["system", "developer", "user", "assistant", "tool"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
FinishReason = Literal["stop", "length", "tool_calls"]
JSONObject = Mapping[str, Any]

# ---- what a request says ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One picture as encoded bytes (PNG, JPEG, WebP or GIF), its header checked.

    `url` is set, and `data` empty, only until an address that a request names is fetched. `where`
    is the request's field, for errors.
    """

    data: bytes
    media_type: str = "image/png"
    detail: Literal["auto", "low", "high"] = "auto"
    url: str = ""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """Chain of thought of an earlier assistant turn, given back by the client or remembered."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A call the assistant made. `arguments` is the string the model wrote, JSON or not."""

    id: str
    name: str
    arguments: str


Part = TextPart | ImagePart | ReasoningPart | ToolCallPart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. A tool's result is role "tool" with `tool_call_id` naming the call it answers."""

    role: Role
    parts: tuple[Part, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, ReasoningPart))

    @property
    def tool_calls(self) -> tuple[ToolCallPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolCallPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImagePart))


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call. `parameters` is a JSON Schema, None means no arguments."""

    name: str
    description: str = ""
    parameters: JSONObject | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`names` narrows the choice: ("auto", names) is allowed_tools, ("required", one name) forces
    it."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    kind: Literal["text", "json_object", "json_schema"] = "text"
    schema: JSONObject | None = None
    name: str = "response"
    description: str = ""
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `max_tokens` None is up to the context's
    end.

    `unset` names the fields that the caller left open: the model's own defaults take their place.
    `logprobs` None is off, 0 the chosen token's only, up to 20 alternatives. `seed` None draws
    fresh noise.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    unset: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to continue.

    `tenant` names whose budget, fairness turn and prefix cache this is (a key's fingerprint, never
    the key). `template_options` holds only allow-listed chat template arguments. `may_switch` lets
    a request for an offered model that is not loaded start its loading.
    """

    messages: Sequence[Message]
    sampling: Sampling = field(default_factory=Sampling)
    model: str = "default"
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = field(default_factory=ResponseFormat)
    reasoning_effort: Effort | None = None
    template_options: JSONObject = field(default_factory=dict)
    continue_final_message: bool = False
    tenant: str = ""
    request_id: str = ""
    may_switch: bool = False


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A raw prompt to continue (/v1/completions): text or token ids, no chat format."""

    prompt: str | tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    model: str = "default"
    tenant: str = ""
    request_id: str = ""
    may_switch: bool = False


# ---- what a model answers ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`data` is the token's exact bytes, which may be part of a character. `logprob` is natural
    log."""

    token: str
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the request was submitted: to its first token, and to its end."""

    first_token_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is valid and in the engine's queue; what fails later fails inside the stream."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Queued:
    """Others run first. `wait_seconds` is an estimate, None when nothing was measured yet."""

    ahead: int
    wait_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """`call` counts the choice's calls from 0 without gaps; `id` is unique everywhere."""

    call: int
    id: str
    name: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    call: int
    arguments: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    reason: FinishReason
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    usage: Usage
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True, slots=True)
class Failed:
    error: ServeError


@dataclass(frozen=True, slots=True)
class Cancelled:
    usage: Usage = field(default_factory=Usage)


ContentEvent = TextDelta | ReasoningDelta | ToolCallStarted | ToolCallDelta
TerminalEvent = Finished | Failed | Cancelled
Event = Accepted | Queued | ContentEvent | ChoiceFinished | TerminalEvent


def is_terminal(event: Event) -> bool:
    return isinstance(event, Finished | Failed | Cancelled)


# ---- what a model is and how its loading goes ---------------------------------------------------

Phase = Literal["starting", "downloading", "loading", "warming", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Read from the loaded model, never from its name. None means unknown, which is not no."""

    vision: bool | None = None
    tools: bool | None = None
    reasoning: bool | None = None
    efforts: tuple[Effort, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What may be said of a served model in public. `aliases` are names requests may use for it,
    `defaults` how its makers want it sampled when a request does not say.
    """

    id: str
    context_length: int
    capabilities: Capabilities = field(default_factory=Capabilities)
    aliases: tuple[str, ...] = ()
    created: int = 0
    source: str = ""
    quantization: str = ""
    device: str = ""
    parameters: int = 0
    defaults: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A candidate that does not serve: why, and what to set or do so that it would."""

    candidate: str
    reason: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the loading stands. Bytes are None while unknown; `stalled_seconds` since the last
    byte."""

    phase: Phase = "starting"
    candidate: str = ""
    source: str = ""
    done_bytes: int | None = None
    total_bytes: int | None = None
    bytes_per_second: float | None = None
    seconds_left: float | None = None
    stalled_seconds: float = 0.0
    attempt: int = 1
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """The answer to: what serves here, how far is it, and why not the one asked for.

    `offered` are the ids that fit this machine and can be switched to, the served one among them;
    `seeing` those of them made for images too, as their configuration says. `wanted` is the one
    being switched to; `loaded` are the ids that are held in memory and answer at once.
    """

    progress: Progress = field(default_factory=Progress)
    model: ModelCard | None = None
    requested: str = ""
    passed_over: tuple[PassedOver, ...] = ()
    offered: tuple[str, ...] = ()
    seeing: tuple[str, ...] = ()
    wanted: str = ""
    loaded: tuple[str, ...] = ()
    running: int = 0
    waiting: int = 0

    @property
    def is_ready(self) -> bool:
        return self.model is not None and self.progress.phase == "ready"
