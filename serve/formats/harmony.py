"""Harmony, the format of gpt-oss: roles and channels on token ids.

The ids of its control tokens are looked up in the model's own tokenizer; nothing is downloaded.
Rendering is in harmony_render.py, reading in harmony_parse.py, what binds the answer in grammar.py.
Made by choose.py, called by service.py.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import cast

from serve.engine.face import Prompt
from serve.errors import InvalidRequest
from serve.formats.base import Rendered, StreamParser
from serve.formats.calls import CallWriter
from serve.formats.demands import EFFORTS, allowed_options, check_demands, raw_prompt, tools_shown
from serve.formats.grammar import GrammarCompiler
from serve.formats.harmony_grammar import harmony_grammar
from serve.formats.harmony_parse import HarmonyParser
from serve.formats.harmony_render import Marks, render
from serve.formats.text import ContentWriter, TextParser
from serve.formats.vocabulary import Vocabulary
from serve.values import Capabilities, ChatRequest, Effort, TextRequest


class HarmonyFormat:
    """`today` gives the date that the system message tells."""

    name = "harmony"

    def __init__(
        self,
        vocabulary: Vocabulary,
        marks: Marks,
        eos_ids: frozenset[int] = frozenset(),
        today: Callable[[], date] = date.today,
    ) -> None:
        self._vocabulary = vocabulary
        self._marks = marks
        self._today = today
        self._grammars = GrammarCompiler(vocabulary, eos_ids | {marks.returns, marks.call})

    def capabilities(self) -> Capabilities:
        return Capabilities(
            vision=None, tools=True, reasoning=True, efforts=("low", "medium", "high")
        )

    def render(self, request: ChatRequest) -> Rendered:
        check_demands(request)
        tools = tools_shown(request)
        grammar = harmony_grammar(self._grammars, self._marks, request, tools)
        ids = render(
            self._vocabulary,
            self._marks,
            request,
            effort=EFFORTS[_effort(request)],
            today=self._today(),
            tools=tools,
        )
        ends = frozenset({self._marks.returns, self._marks.call})
        return Rendered(Prompt(ids), ends, grammar)

    def warm(self) -> None:
        """Do now what the first request, and the first for structured output, would wait for."""
        self._vocabulary.encode_plain("")
        self._grammars.warm()

    def parser(self, request: ChatRequest, choice: int = 0) -> StreamParser:
        tools = tools_shown(request)
        limit = None if request.parallel_tool_calls else 1
        return HarmonyParser(
            self._vocabulary,
            self._marks,
            CallWriter([tool.name for tool in tools], choice, limit),
            ContentWriter(self._vocabulary, request.sampling.stop, choice),
            choice=choice,
            starts_open=request.continue_final_message,
            takes_calls=bool(tools),
            shows_preambles=request.response_format.kind == "text",
        )

    def render_text(self, request: TextRequest) -> Rendered:
        return Rendered(Prompt(raw_prompt(self._vocabulary, request.prompt)))

    def text_parser(self, request: TextRequest, choice: int = 0) -> StreamParser:
        return TextParser(
            self._vocabulary,
            hidden=self._vocabulary.control_ids,
            stops=request.sampling.stop,
            choice=choice,
            is_start=False,
        )


def _effort(request: ChatRequest) -> Effort:
    options = allowed_options(request)
    effort = request.reasoning_effort or options.get("reasoning_effort")
    if effort is None:
        return "low" if options.get("enable_thinking") is False else "medium"
    if effort not in EFFORTS:
        raise InvalidRequest(
            f"reasoning_effort {effort!r} is none of {', '.join(EFFORTS)}.",
            param="reasoning_effort",
        )
    return cast(Effort, effort)
