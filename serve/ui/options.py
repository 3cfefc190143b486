"""What a reader may set for an answer, checked: system prompt, sampling, length, effort, model.

The one place where the page's and the gradio endpoint's options become a ChatRequest. Knows no
widgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from serve.errors import InvalidRequest
from serve.values import ChatRequest, Effort, ImagePart, Message, Sampling


@dataclass(frozen=True, slots=True)
class Options:
    """`max_tokens` None is up to the context's end; other Nones are the model's own defaults."""

    system: str = ""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    effort: Effort | None = None
    model: str = "default"

    def request(self, messages: Sequence[Message]) -> ChatRequest:
        left_open = {"temperature": self.temperature, "top_p": self.top_p}
        sampling = Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            max_tokens=self.max_tokens,
            seed=self.seed,
            unset=(
                *(name for name, value in left_open.items() if value is None),
                *("top_k", "min_p", "repetition_penalty"),
            ),
        )
        return ChatRequest(
            messages, sampling, model=self.model or "default", reasoning_effort=self.effort
        )


def options_from(given: Mapping[str, Any]) -> Options:
    """Raises InvalidRequest naming the field and what is allowed. Unknown names are refused."""
    known = Options.__dataclass_fields__
    if unknown := sorted(set(given) - set(known)):
        raise InvalidRequest(f"Unknown option {unknown[0]!r}.", param=unknown[0])
    effort = given.get("effort") or None
    if effort is not None and effort not in get_args(Effort):
        raise InvalidRequest(
            f"effort must be one of {', '.join(get_args(Effort))}.", param="effort"
        )
    return Options(
        system=str(given.get("system") or ""),
        temperature=_number(given, "temperature", 0.0, 2.0),
        top_p=_number(given, "top_p", 0.0, 1.0),
        max_tokens=_whole(given, "max_tokens", 1),
        seed=_whole(given, "seed", 0),
        effort=effort,
        model=str(given.get("model") or "default"),
    )


def _number(given: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be a number from {low:g} to {high:g}.", param=name)
    return float(value)


def _whole(given: Mapping[str, Any], name: str, low: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise InvalidRequest(f"{name} must be a whole number.", param=name)
    if value < low:
        raise InvalidRequest(f"{name} must be at least {low}.", param=name)
    return int(value)


def without_pictures(messages: Sequence[Message]) -> list[Message]:
    """The same conversation for a model that cannot see."""
    return [
        Message(
            message.role,
            tuple(part for part in message.parts if not isinstance(part, ImagePart)),
            message.name,
            message.tool_call_id,
        )
        for message in messages
    ]
