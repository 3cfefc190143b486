"""Whether a request may reach the engine: every number finite, of its kind and in its range.

Raises InvalidRequest naming the field; nothing here touches the engine's state. Called by
engine.submit on the caller's thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from serve.engine.face import GenerationRequest
from serve.errors import ContextLengthExceeded, InvalidRequest
from serve.values import Sampling

MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_BIAS_ENTRIES = 1024
_NUMBERS: tuple[tuple[str, float, float, bool], ...] = (
    # field, lowest, highest, whether the lowest itself is allowed
    ("temperature", 0.0, 2.0, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("frequency_penalty", -2.0, 2.0, True),
    ("presence_penalty", -2.0, 2.0, True),
    ("repetition_penalty", 0.0, 10.0, False),
)
_COUNTS: tuple[tuple[str, int, int, bool], ...] = (
    # field, lowest, highest, whether None is allowed
    ("top_k", 0, 2**31 - 1, False),
    ("max_tokens", 1, 2**31 - 1, True),
    ("min_tokens", 0, 2**31 - 1, False),
    ("seed", -(2**63), 2**64 - 1, True),
    ("logprobs", 0, MAX_LOGPROBS, True),
    ("n", 1, MAX_CHOICES, False),
)


def check_request(request: GenerationRequest, vocabulary: int, context_length: int) -> None:
    """Raises InvalidRequest or ContextLengthExceeded."""
    ids = request.prompt.ids
    if not ids:
        raise InvalidRequest("The prompt is empty: give at least one token.", param="messages")
    _check_ids(ids, vocabulary, "messages")
    if len(ids) >= context_length:
        raise ContextLengthExceeded(
            f"The prompt has {len(ids)} tokens; the context holds {context_length}, and at least "
            "one is needed for the answer. Shorten the conversation.",
            param="messages",
        )
    check_sampling(request.sampling, vocabulary)
    _check_ids(request.stop_ids, vocabulary, "stop_token_ids")


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    for name, low, high, includes_low in _NUMBERS:
        _check_number(name, getattr(sampling, name), low, high, includes_low)
    for name, least, most, allows_none in _COUNTS:
        value = getattr(sampling, name)
        if not (value is None and allows_none):
            _check_count(name, value, least, most)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest("min_tokens is larger than max_tokens.", param="min_tokens")
    if not isinstance(sampling.ignore_eos, bool):
        raise InvalidRequest("ignore_eos must be true or false.", param="ignore_eos")
    _check_ids(sampling.stop_token_ids, vocabulary, "stop_token_ids")
    if len(sampling.logit_bias) > MAX_BIAS_ENTRIES:
        raise InvalidRequest(
            f"logit_bias has {len(sampling.logit_bias)} entries; at most {MAX_BIAS_ENTRIES}.",
            param="logit_bias",
        )
    _check_ids((token for token, _ in sampling.logit_bias), vocabulary, "logit_bias")
    for _, bias in sampling.logit_bias:
        _check_number("logit_bias", bias, -100.0, 100.0, True)


def _check_number(name: str, value: object, low: float, high: float, includes_low: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(_clipped(value)):
        raise InvalidRequest(f"{name} must be a finite number.", param=name)
    if not low <= value <= high or (value == low and not includes_low):
        edge = "from" if includes_low else "above"
        raise InvalidRequest(f"{name} must be {edge} {low:g} to {high:g}.", param=name)


def _clipped(value: int | float) -> float:
    """As a float; a whole number too large for one stays out of every range as infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be a whole number.", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be from {low} to {high}.", param=name)


def _check_ids(ids: Iterable[object], vocabulary: int, param: str) -> None:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise InvalidRequest(
                f"{param}: token ids must be whole numbers from 0 to {vocabulary - 1}.", param=param
            )
