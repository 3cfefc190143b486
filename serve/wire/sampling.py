"""Sampling fields, the same words in every dialect, as Sampling.

Every number is range-checked here, before it reaches the engine. Used by chat.py, responses.py and
completions.py.
"""

from __future__ import annotations

import math
import re

from serve.errors import InvalidRequest
from serve.values import Sampling
from serve.wire import bounds
from serve.wire.body import Body, shown

MOST_TOKENS = 10_000_000
_SMALLEST_TOP_P = 1e-9
_MODELS_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_sampling(
    body: Body, *, max_tokens: int | None, logprobs: int | None, n: int = 1
) -> Sampling:
    """All but the three fields whose names or meaning differ between dialects."""
    min_tokens = body.whole("min_tokens", 0, MOST_TOKENS) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {min_tokens}, more than the {max_tokens} tokens allowed at most.",
            param="min_tokens",
        )
    top_p = _or(body.number("top_p", 0, 1), 1.0)
    return Sampling(
        temperature=_or(body.number("temperature", 0, 2), 1.0),
        top_p=max(top_p, _SMALLEST_TOP_P),
        top_k=max(body.whole("top_k", -1, 1_000_000) or 0, 0),
        min_p=_or(body.number("min_p", 0, 1), 0.0),
        frequency_penalty=_or(body.number("frequency_penalty", -2, 2), 0.0),
        presence_penalty=_or(body.number("presence_penalty", -2, 2), 0.0),
        repetition_penalty=_or(body.number("repetition_penalty", 0.01, 10), 1.0),
        logit_bias=_read_bias(body),
        seed=body.whole("seed", -(2**63), 2**63 - 1),
        stop=read_stop(body),
        stop_token_ids=_read_ids(body, "stop_token_ids"),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=body.flag("ignore_eos") or False,
        logprobs=logprobs,
        n=n,
        unset=tuple(name for name in _MODELS_OWN if body.get(name) is None),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def read_n(body: Body) -> int:
    n = body.whole("n", 1, 2**31)
    bounds.CHOICES.check(n or 1, body.at("n"))
    return n or 1


def read_top_logprobs(body: Body, name: str = "top_logprobs") -> int | None:
    return body.whole(name, 0, bounds.TOP_LOGPROBS.most)


def read_stop(body: Body) -> tuple[str, ...]:
    value = body.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise body.wrong("stop", "a string or an array of strings")
    bounds.STOPS.check(len(stops), body.at("stop"))
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise InvalidRequest(
                f"'{body.at('stop')}' must hold non-empty strings, not {shown(stop)}.",
                param=body.at("stop"),
            )
        bounds.STOP_CHARS.check(len(stop), body.at("stop"))
    return tuple(dict.fromkeys(stops))


def _read_ids(body: Body, name: str) -> tuple[int, ...]:
    values = body.list(name) or []
    bounds.BIASES.check(len(values), body.at(name))
    if not all(type(value) is int and 0 <= value < 2**31 for value in values):
        raise body.wrong(name, "an array of token ids")
    return tuple(values)


def _read_bias(body: Body) -> tuple[tuple[int, float], ...]:
    bias = body.object("logit_bias")
    if bias is None:
        return ()
    bounds.BIASES.check(len(bias.data), bias.path)
    found: list[tuple[int, float]] = []
    for token in bias.data:
        if not re.fullmatch(r"\d{1,9}", token, re.ASCII):
            raise InvalidRequest(
                f"'{bias.path}' must map token ids to biases; {shown(token)} is no token id.",
                param=bias.path,
            )
        value = bias.number(token, -100, 100)
        if value is not None and math.isfinite(value):
            found.append((int(token), value))
    return tuple(found)
