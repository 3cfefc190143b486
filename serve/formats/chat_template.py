"""One tokenizer's chat template: what it takes, and conversations through its sandboxed renderer.

What it takes is found out by rendering small conversations with it. Control tokens in what users
wrote are encoded as text, so a message cannot forge a turn. Knows no tags. Used by template.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2.meta
from jinja2.exceptions import TemplateError

from serve.errors import InvalidRequest, Unsupported
from serve.formats.demands import EFFORTS, allowed_options
from serve.formats.turns import Habits, Turn
from serve.formats.vocabulary import Vocabulary
from serve.values import ChatRequest, Effort

# What a template, its sandbox or the tokenizer raises for a conversation that it cannot take.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)

_PROBE = "Qx7"  # a text that no template holds


class Template:
    """One tokenizer's chat template: what it takes, and conversations to text or ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = vocabulary.tokenizer
        self.source = _source(self._tokenizer.chat_template)
        self._variables = _variables(self.source)
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

    @property
    def switch(self) -> str | None:
        """The variable that turns reasoning on and off, if the template has one."""
        return next((n for n in ("enable_thinking", "thinking") if self._reads(n)), None)

    @property
    def efforts(self) -> tuple[Effort, ...]:
        """Those that make a difference."""
        none: tuple[Effort, ...] = ("none",) if self.switch else ()
        if self._reads("reasoning_effort"):
            return (*none, "low", "medium", "high")
        return (*none, "medium") if self.switch else ()

    def options(self, request: ChatRequest, *, reasons: bool) -> dict[str, Any]:
        """The template arguments for a request's effort. `reasons`: the model thinks in tags.
        Raises InvalidRequest or Unsupported for an effort that the model cannot be asked for."""
        given = allowed_options(request)
        effort = request.reasoning_effort or given.get("reasoning_effort")
        thinks = given.get("enable_thinking", None if effort is None else effort != "none")
        if effort is not None and effort not in EFFORTS:
            raise InvalidRequest(
                f"reasoning_effort {effort!r} is none of {', '.join(EFFORTS)}.",
                param="reasoning_effort",
            )
        found: dict[str, Any] = {}
        if effort not in (None, "none") and self._reads("reasoning_effort"):
            found["reasoning_effort"] = EFFORTS[effort]
        if thinks is not None and self.switch:
            found[self.switch] = bool(thinks)
        elif thinks is not None and bool(thinks) != reasons and not found:
            # An effort alone is left alone by a model that does not reason: whoever sent it may
            # have done so before it was known which model answers.
            if reasons or "enable_thinking" in given:
                self._refuse_effort(reasons, "reasoning_effort" if effort else "enable_thinking")
        return found

    def _refuse_effort(self, reasons: bool, field: str) -> None:
        told = (
            "This model always reasons and cannot be told not to: leave it out."
            if reasons
            else "This model does not reason before it answers: leave it out, or ask for none."
        )
        raise Unsupported(told, param=field)

    @property
    def takes_tools(self) -> bool:
        return self._reads("tools")

    def _reads(self, variable: str) -> bool:
        return variable in self._variables

    def _shows(self, conversation: Sequence[Turn]) -> bool:
        try:
            return _PROBE in self.text(conversation)
        except REFUSALS:
            return False

    def _probe(self) -> Habits:
        parts = not self._shows([_ask(_PROBE, False)]) and self._shows([_ask(_PROBE, True)])
        system = {"role": "system", "content": _content(_PROBE, parts)}
        return Habits(
            system=self._shows([system, _ask("hi", parts)]),
            developer="developer" in self.source,
            parts=parts,
        )


def _variables(source: str) -> frozenset[str]:
    """The names that a template expects from outside."""
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", source)  # transformers' own tag
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(plain)))
    except jinja2.TemplateSyntaxError:
        return frozenset()


def _source(template: Any) -> str:
    """The template's text; a tokenizer may have several by name."""
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template or ""


def _content(text: str, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text


def _ask(text: str, parts: bool) -> Turn:
    return {"role": "user", "content": _content(text, parts)}


def refused(reason: Exception) -> InvalidRequest:
    """A template's refusal as an error of the request; only the template's own words are shown."""
    said = str(reason) if isinstance(reason, TemplateError) else type(reason).__name__
    return InvalidRequest(
        f"The model's chat template cannot take this conversation: {said}", param="messages"
    )
