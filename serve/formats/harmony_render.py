"""Conversations as Harmony token ids, the format gpt-oss speaks.

Text is encoded as text, so nothing a user writes can become a control token; the control ids are
looked up in the model's own vocabulary. Equal to the reference library openai-harmony, but for two
things, both what the model itself was trained on: a call's header names the channel before the
recipient, and reasoning is left out up to the last final answer, not only up to the first. Knows no
grammar and no engine. Used by harmony.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date

from serve.formats.typescript import NAMESPACE, tools_section
from serve.formats.vocabulary import Vocabulary
from serve.values import ChatRequest, Message, ResponseFormat, Tool, ToolCallPart

_NAMES = ("start", "end", "message", "channel", "constrain", "return", "call")
MARKERS = tuple(f"<|{name}|>" for name in _NAMES)
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"


@dataclass(frozen=True, slots=True)
class Marks:
    """The control ids, as this model's tokenizer numbers them."""

    start: int
    end: int
    message: int
    channel: int
    constrain: int
    returns: int
    call: int


def marks_of(vocabulary: Vocabulary) -> Marks | None:
    """None: this tokenizer does not speak Harmony."""
    ids = [vocabulary.id_of(token) for token in MARKERS]
    known = [token for token in ids if token is not None]
    return Marks(*known) if len(known) == len(MARKERS) else None


class _Prompt:
    """Control ids and texts in order; the texts are encoded all at once at the end."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self._pieces: list[int | str] = []

    def add(self, *pieces: int | str) -> None:
        self._pieces += pieces

    def message(self, header: Sequence[int | str], content: str, end: int | None = None) -> None:
        end = self.marks.end if end is None else end
        self.add(self.marks.start, *header, self.marks.message, content, end)

    def ids(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        texts = [piece for piece in self._pieces if isinstance(piece, str)]
        encoded = iter(vocabulary.encode_plain_many(texts))
        found: list[int] = []
        for piece in self._pieces:
            if isinstance(piece, str):
                found += next(encoded)
            else:
                found.append(piece)
        return tuple(found)


def render(
    vocabulary: Vocabulary,
    marks: Marks,
    request: ChatRequest,
    *,
    effort: str,
    today: date,
    tools: Sequence[Tool],
) -> tuple[int, ...]:
    """The whole prompt, ending where the assistant's header begins, or inside its last message when
    that is to be continued."""
    prompt = _Prompt(marks)
    lead, rest = _split(request.messages)
    prompt.message(["system"], _system(effort, today, bool(tools)))
    developer = _developer(lead, tools, request.response_format)
    if developer:
        prompt.message(["developer"], developer)
    _history(prompt, rest, continues=request.continue_final_message)
    if not request.continue_final_message:
        prompt.add(marks.start, "assistant")
    return prompt.ids(vocabulary)


def _split(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """Leading instructions, and the conversation."""
    at = 0
    while at < len(messages) and messages[at].role in ("system", "developer"):
        at += 1
    return list(messages[:at]), list(messages[at:])


def _system(effort: str, today: date, has_tools: bool) -> str:
    channels = (
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    if has_tools:
        channels += f"\nCalls to these tools must go to the commentary channel: '{NAMESPACE}'."
    about = f"{IDENTITY}\nKnowledge cutoff: {KNOWLEDGE_CUTOFF}\nCurrent date: {today.isoformat()}"
    return f"{about}\n\nReasoning: {effort}\n\n{channels}"


def _developer(lead: Iterable[Message], tools: Sequence[Tool], answer: ResponseFormat) -> str:
    instructions = "\n\n".join(message.text for message in lead if message.text)
    sections = [f"# Instructions\n\n{instructions}"] if instructions else []
    if tools:
        sections.append(tools_section(tools))
    if answer.kind != "text":
        sections.append(_response_format(answer))
    return "\n\n".join(sections)


def _response_format(answer: ResponseFormat) -> str:
    if answer.kind == "json_object":
        return '# Response Formats\n\n## json_object\n\n// One JSON object.\n{"type":"object"}'
    schema = json.dumps(answer.schema or {}, ensure_ascii=False, separators=(",", ":"))
    about = "".join(f"// {line}\n" for line in answer.description.splitlines())
    return f"# Response Formats\n\n## {answer.name}\n\n{about}{schema}"


def _history(prompt: _Prompt, messages: Sequence[Message], *, continues: bool) -> None:
    finals = [i for i, m in enumerate(messages) if m.role == "assistant" and _is_final(m)]
    if continues and finals and finals[-1] == len(messages) - 1:
        finals.pop()  # an answer still being written keeps its reasoning
    last_final = finals[-1] if finals else -1
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    for i, message in enumerate(messages):
        if message.role == "assistant":
            keeps = i > last_final
            _assistant(prompt, message, keeps, is_open=continues and i == len(messages) - 1)
        elif message.role == "tool":
            name = message.name or names.get(message.tool_call_id or "", "") or "tool"
            header = f"{NAMESPACE}.{name} to=assistant"
            prompt.message([header, prompt.marks.channel, "commentary"], message.text)
        elif message.role == "user":
            prompt.message([f"user:{message.name}" if message.name else "user"], message.text)
        elif message.text:
            prompt.message(["developer"], f"# Instructions\n\n{message.text}")


def _is_final(message: Message) -> bool:
    return not message.tool_calls and bool(message.text)


def _assistant(prompt: _Prompt, message: Message, keeps: bool, *, is_open: bool) -> None:
    """One turn as the messages the model wrote: reasoning, a preamble or the answer, calls."""
    channel = prompt.marks.channel
    if message.reasoning and keeps:
        prompt.message(["assistant", channel, "analysis"], message.reasoning)
    if is_open:
        prompt.add(prompt.marks.start, "assistant", channel, "final", prompt.marks.message)
        prompt.add(message.text)
        return
    if message.text:
        said = "commentary" if message.tool_calls else "final"
        prompt.message(["assistant", channel, said], message.text)
    for call in message.tool_calls:
        _call(prompt, call)


def _call(prompt: _Prompt, call: ToolCallPart) -> None:
    marks = prompt.marks
    recipient = f" to={NAMESPACE}.{call.name}"
    header: list[int | str] = [
        "assistant",
        marks.channel,
        "commentary",
        recipient,
        " ",
        marks.constrain,
        "json",
    ]
    prompt.message(header, call.arguments, marks.call)
