"""Any Hugging Face chat template: conversations through the tokenizer's own sandboxed renderer.

What the template takes is found out by rendering small conversations with it, not from the model's
name. Control tokens inside what users wrote are encoded as text, so a message cannot forge a turn.
Template arguments come from an allow-list only. Knows no HTTP and no engine; made by choose.py,
called off the event loop by service.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from serve.engine.face import Prompt
from serve.errors import InvalidRequest, Unsupported
from serve.formats.base import Rendered, StreamParser
from serve.formats.text import TextParser
from serve.formats.turns import Habits, Turn, tool_turns, turns
from serve.formats.vocabulary import Vocabulary
from serve.values import Capabilities, ChatRequest, TextRequest

ALLOWED_OPTIONS = ("reasoning_effort", "enable_thinking")

_PROBE = "Qx7"  # a text that no template holds


class Template:
    """One tokenizer's chat template: what it takes, and conversations to text or ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = vocabulary.tokenizer
        self.source = _source(self._tokenizer.chat_template)
        self.habits = self._probe() if self.source else Habits()

    def ids(
        self,
        conversation: Sequence[Turn],
        tools: Sequence[Turn] = (),
        options: Mapping[str, Any] | None = None,
        *,
        continues: bool = False,
    ) -> list[int]:
        """The whole prompt's ids. `continues`: the last turn stays open. Raises what the template
        raises."""
        with self._vocabulary.lock:
            found = self._tokenizer.apply_chat_template(
                list(conversation),
                tools=list(tools) or None,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
                **(options or {}),
            )
        return [int(token) for token in found]

    def text(
        self,
        conversation: Sequence[Turn],
        tools: Sequence[Turn] = (),
        options: Mapping[str, Any] | None = None,
        *,
        asks: bool = True,
    ) -> str:
        """The same as text; `asks` adds the opening of the answer. For probing, not for prompts."""
        found = self._tokenizer.apply_chat_template(
            list(conversation),
            tools=list(tools) or None,
            add_generation_prompt=asks,
            tokenize=False,
            **(options or {}),
        )
        return str(found)

    def opening(self, options: Mapping[str, Any]) -> str:
        """What the template writes after the last turn, where the answer begins."""
        turn = _ask(_PROBE, self.habits.parts)
        closed = self.text([turn], options=options, asks=False)
        asked = self.text([turn], options=options)
        return asked[len(closed) :] if asked.startswith(closed) else asked.split(_PROBE)[-1]

    def takes(self, option: str) -> bool:
        """Whether the template reads a variable of this name."""
        return option in self.source

    def _shows(self, conversation: Sequence[Turn]) -> bool:
        try:
            return _PROBE in self.text(conversation)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return False

    def _probe(self) -> Habits:
        parts = not self._shows([_ask(_PROBE, False)]) and self._shows([_ask(_PROBE, True)])
        system = {"role": "system", "content": _content(_PROBE, parts)}
        return Habits(
            system=self._shows([system, _ask("hi", parts)]),
            developer="developer" in self.source,
            parts=parts,
        )


def _source(template: Any) -> str:
    """The template's text; a tokenizer may have several by name."""
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template or ""


def _content(text: str, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text


def _ask(text: str, parts: bool) -> Turn:
    return {"role": "user", "content": _content(text, parts)}


class TemplateFormat:
    """A chat format made of the tokenizer's own template."""

    name = "template"

    def __init__(self, vocabulary: Vocabulary, eos_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._hidden = vocabulary.control_ids | eos_ids
        self._template = Template(vocabulary)

    def capabilities(self) -> Capabilities:
        return Capabilities(vision=None, tools=False, reasoning=False)

    def render(self, request: ChatRequest) -> Rendered:
        self._check(request)
        options = self._options(request)
        habits = self._template.habits
        tools = tool_turns(request.tools) if request.tool_choice.mode != "none" else []
        continues = request.continue_final_message
        if continues and (not request.messages or request.messages[-1].role != "assistant"):
            raise InvalidRequest(
                "To continue a message, the last one must be the assistant's.",
                param="continue_final_message",
            )
        try:
            ids = self._template.ids(
                turns(request.messages, habits), tools, options, continues=continues
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as first:
            ids = self._second_try(request, tools, options, first)
        return Rendered(Prompt(tuple(ids)))

    def parser(self, request: ChatRequest, choice: int = 0) -> StreamParser:
        return TextParser(
            self._vocabulary,
            hidden=self._hidden,
            stops=request.sampling.stop,
            choice=choice,
            is_start=not request.continue_final_message,
        )

    def render_text(self, request: TextRequest) -> Rendered:
        return Rendered(Prompt(raw_prompt(self._vocabulary, request.prompt)))

    def text_parser(self, request: TextRequest, choice: int = 0) -> StreamParser:
        return TextParser(
            self._vocabulary,
            hidden=self._hidden,
            stops=request.sampling.stop,
            choice=choice,
            is_start=False,
        )

    def _check(self, request: ChatRequest) -> None:
        if not self._template.source:
            raise Unsupported(
                "This model has no chat template, so it cannot hold a conversation: use "
                "/v1/completions, or load a model trained for chat.",
                param="messages",
            )
        if not request.messages:
            raise InvalidRequest("At least one message is needed.", param="messages")
        if request.tools and request.tool_choice.mode != "none":
            raise Unsupported(
                "This model's chat template has no tools: leave tools out, set tool_choice to "
                '"none", or load a model trained to call tools.',
                param="tools",
            )

    def _options(self, request: ChatRequest) -> dict[str, Any]:
        return allowed_options(request)

    def _second_try(
        self,
        request: ChatRequest,
        tools: Sequence[Turn],
        options: Mapping[str, Any],
        first: Exception,
    ) -> list[int]:
        """Old tool calls whose arguments are no JSON break some templates; history is data, so
        try them wrapped before the request is refused with the template's own reason."""
        if not any(message.tool_calls for message in request.messages):
            raise refused(first) from first
        written = turns(request.messages, self._template.habits, wrap_arguments=True)
        try:
            return self._template.ids(
                written, tools, options, continues=request.continue_final_message
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as second:
            raise refused(second) from second


def allowed_options(request: ChatRequest) -> dict[str, Any]:
    """The request's own template arguments, checked against the allow-list."""
    for name in request.template_options:
        if name not in ALLOWED_OPTIONS:
            raise InvalidRequest(
                f"Template argument {name!r} is not taken; allowed: {', '.join(ALLOWED_OPTIONS)}.",
                param=f"chat_template_kwargs.{name}",
            )
    return dict(request.template_options)


def refused(reason: Exception) -> InvalidRequest:
    """A template's refusal as an error of the request; only the template's own words are shown."""
    said = str(reason) if isinstance(reason, TemplateError) else type(reason).__name__
    return InvalidRequest(
        f"The model's chat template cannot take this conversation: {said}", param="messages"
    )


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
