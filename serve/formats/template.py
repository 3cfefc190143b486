"""The format of any model with a chat template: its own turns, its family's tags.

Template arguments come from an allow-list only. Knows no HTTP and no engine; made by choose.py,
called off the event loop by service.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from serve.engine.face import Prompt
from serve.errors import InvalidRequest, Unsupported
from serve.formats.base import Rendered, StreamParser
from serve.formats.calls import CallWriter
from serve.formats.chat_template import REFUSALS, Template, refused
from serve.formats.demands import (
    check_demands,
    raw_prompt,
    tools_shown,
)
from serve.formats.dialect_grammar import dialect_grammar
from serve.formats.dialects import calls_of, reasoning_of
from serve.formats.grammar import GrammarCompiler
from serve.formats.images import Sight
from serve.formats.tag_parse import Mode, TagParser
from serve.formats.text import ContentWriter, TextParser
from serve.formats.turns import MANNERS, tool_turns, turns
from serve.formats.vocabulary import Vocabulary
from serve.values import Capabilities, ChatRequest, Message, TextPart, TextRequest, Tool


class TemplateFormat:
    """A chat format made of the tokenizer's own template; tags as the template speaks of them."""

    name = "template"

    def __init__(
        self, vocabulary: Vocabulary, eos_ids: frozenset[int], sight: Sight | None = None
    ) -> None:
        """`sight` is there for a model that sees."""
        self._vocabulary = vocabulary
        self._hidden = vocabulary.control_ids | eos_ids
        self._template = Template(vocabulary)
        self._sight = sight
        self._habits = replace(self._template.habits, images=sight is not None)
        self._reasoning = reasoning_of(self._template.source)
        self._syntax = calls_of(self._template.source) if self._template.takes_tools else None
        own_end = vocabulary.tokenizer.eos_token_id
        ends = eos_ids | ({int(own_end)} if own_end is not None else set())
        self._grammars = GrammarCompiler(vocabulary, ends)
        self._openings: dict[str, Mode] = {}

    def capabilities(self) -> Capabilities:
        return Capabilities(
            vision=None,
            tools=self._syntax is not None,
            reasoning=self._reasoning is not None,
            efforts=self._template.efforts if self._reasoning else (),
        )

    def warm(self) -> None:
        """Do now what the first request for structured output would wait for."""
        self._grammars.warm()

    def render(self, request: ChatRequest) -> Rendered:
        self._check(request)
        options = self._options(request)
        tools = tools_shown(request)
        grammar = dialect_grammar(
            self._grammars,
            request,
            tools,
            reasoning=self._reasoning,
            syntax=self._syntax,
            opens_in=self._opens_in(request),
        )
        return Rendered(self._prompt(request, tools, options), grammar=grammar)

    def parser(self, request: ChatRequest, choice: int = 0) -> StreamParser:
        tools = tools_shown(request)
        if self._reasoning is None and (self._syntax is None or not tools):
            return TextParser(
                self._vocabulary,
                hidden=self._hidden,
                stops=request.sampling.stop,
                choice=choice,
                is_start=not request.continue_final_message,
            )
        limit = None if request.parallel_tool_calls else 1
        return TagParser(
            self._vocabulary,
            ContentWriter(self._vocabulary, request.sampling.stop, choice),
            CallWriter([tool.name for tool in tools], choice, limit),
            reasoning=self._reasoning,
            syntax=self._syntax,
            tools=tools,
            hidden=self._hidden,
            choice=choice,
            opens_in=self._opens_in(request),
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
        check_demands(request, sees=self._sight is not None)
        if self._syntax is None and tools_shown(request):
            raise Unsupported(
                "This model's chat template has no tools, or a way of calling them that is not "
                'known here: leave tools out, set tool_choice to "none", or load another model.',
                param="tools",
            )

    def _options(self, request: ChatRequest) -> dict[str, Any]:
        return self._template.options(request, reasons=self._reasoning is not None)

    def _opens_in(self, request: ChatRequest) -> Mode:
        """Where the end of the prompt leaves the answer: before or inside its reasoning, or
        after."""
        if request.continue_final_message:
            return "content"
        if self._reasoning is None:
            return "start"
        options = self._options(request)
        key = repr(sorted(options.items()))
        if key not in self._openings:
            opening = self._template.opening(options)
            at = opening.rfind(self._reasoning.opens)
            if at < 0:
                self._openings[key] = "start"
            else:
                is_closed = self._reasoning.closes in opening[at:]
                self._openings[key] = "after" if is_closed else "reasoning"
        return self._openings[key]

    def _prompt(
        self, request: ChatRequest, tools: Sequence[Tool], options: Mapping[str, Any]
    ) -> Prompt:
        """Templates are particular about old tool calls; history is data, so every manner of
        writing it is tried before the request is refused with the template's own reason."""
        messages = [*_answer_format(request), *request.messages]
        declared = tool_turns(tools)
        continues = request.continue_final_message
        sight = self._sight if any(message.images for message in messages) else None
        has_calls = any(message.tool_calls for message in messages)
        refusals: list[InvalidRequest] = []
        for manner in MANNERS if has_calls else MANNERS[:1]:
            written = turns(messages, self._habits, manner)
            try:
                if sight is not None:
                    return sight.prompt(written, messages, declared, options, continues=continues)
                ids = self._template.ids(written, declared, options, continues=continues)
                return Prompt(tuple(ids))
            except REFUSALS as reason:
                refusals.append(refused(reason))
        raise refusals[0]


def _answer_format(request: ChatRequest) -> list[Message]:
    """The response format as an instruction, so that the model knows what it is held to."""
    answer = request.response_format
    if answer.kind == "text":
        return []
    told = "Answer with one JSON object and nothing else."
    if answer.schema:
        schema = json.dumps(answer.schema, ensure_ascii=False)
        told = f"Answer with JSON that fits this schema and nothing else:\n{schema}"
        if answer.description:
            told = f"{answer.description}\n{told}"
    return [Message("system", (TextPart(told),))]
