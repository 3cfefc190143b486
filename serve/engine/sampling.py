"""Drawing the next ids: every option per request, all rows of a step in one pass.

For one row, in this order: repetition, frequency and presence penalty, logit_bias, min_tokens,
grammar mask; then, at temperature 0, the largest logit; else divide by the temperature, keep the
top_k largest, the fewest whose probabilities reach top_p, those of at least min_p times the
largest (ties at a limit all stay), and draw by inverting the cumulative distribution at one uniform
number. That number is a hash (SplitMix64) of the request's seed, its choice and the count of ids
drawn so far, so it depends neither on the batch nor on what ran before. Logprobs are of exactly the
distribution drawn from; at temperature 0 of the one at temperature 1.

Called by runner.py on the engine's thread. Knows logits and sequences, no cache and no model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.engine.face import TokenScore
from serve.engine.sequence import Sequence as Choice
from serve.values import Sampling

log = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
_CANDIDATES = 256  # top_p looks among so many first; a flatter row is sorted whole
_BLOCK = 256
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's outcome. `problem` in words when there is none: the row's request fails."""

    token: int = -1
    score: TokenScore | None = None
    problem: str | None = None


def mix(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): 64 bits to 64 well mixed bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the position."""
    return (mix(mix(seed) ^ position) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Masks:
    """What the grammars of a step's rows allow: `words` int32 [bound rows, ceil(vocabulary / 32)],
    one row for each of `rows`; `broken` names rows whose grammar raised."""

    rows: tuple[int, ...]
    words: npt.NDArray[np.int32]
    broken: frozenset[int]


def fill_masks(choices: Sequence[Choice], vocabulary: int) -> Masks | None:
    """Ask every grammar what may come next; None without grammars. Needs no logits, so it can run
    beside the forward pass."""
    rows = tuple(row for row, choice in enumerate(choices) if choice.matcher is not None)
    if not rows:
        return None
    words = np.full((len(rows), -(-vocabulary // 32)), -1, np.int32)
    broken = set()
    for place, row in enumerate(rows):
        matcher = choices[row].matcher
        assert matcher is not None
        try:
            matcher.fill(words, place)
        except Exception:  # a grammar is the caller's: it fails its own request only
            log.exception("A grammar failed to say what may come next")
            broken.add(row)
    return Masks(rows, words, frozenset(broken))


def draw(logits: Tensor, choices: Sequence[Choice], masks: Masks | None = None) -> list[Draw]:
    """The next id of each row. `logits` [rows, vocabulary] may be changed in place."""
    logits = logits.float()
    options = [choice.request.generation.sampling for choice in choices]
    _penalize(logits, choices, options)
    _bias(logits, options)
    _hold_ends(logits, choices, options)
    if masks is not None:
        _apply(masks, logits)
    best, ids = logits.max(-1)  # a number that is not finite shows here: NaN is the largest
    hot = [i for i, o in enumerate(options) if o.temperature > GREEDY_BELOW]
    if hot:
        rows = _shape(
            logits if len(hot) == len(options) else logits[hot], [options[i] for i in hot]
        )
        noise = [uniform(choices[i].seed, choices[i].drawn) for i in hot]
        ids[hot] = _invert(rows, noise)
        if any(options[i].logprobs is not None for i in hot):
            logits[hot] = rows
    scores = _scores(logits, ids, options)
    broken = frozenset() if masks is None else masks.broken
    return [
        _outcome(i in broken, highest, token, score)
        for i, (highest, token, score) in enumerate(
            zip(best.tolist(), ids.tolist(), scores, strict=True)
        )
    ]


def _outcome(is_broken: bool, highest: float, token: int, score: TokenScore | None) -> Draw:
    if is_broken:
        return Draw(problem="The grammar of this request failed.")
    if highest == float("-inf"):
        return Draw(problem="Grammar, bias and min_tokens together allow no token here.")
    if not math.isfinite(highest):
        return Draw(problem="The model computed numbers that are not finite.")
    return Draw(token, score)


def _penalize(logits: Tensor, choices: Sequence[Choice], options: Sequence[Sampling]) -> None:
    for row, (choice, o) in enumerate(zip(choices, options, strict=True)):
        counts = choice.counts
        if o.repetition_penalty != 1.0:
            seen = torch.tensor(list(choice.seen_ids()), device=logits.device)
            values = logits[row, seen]
            times = values * o.repetition_penalty
            logits[row, seen] = torch.where(values < 0, times, values / o.repetition_penalty)
        if counts and (o.frequency_penalty or o.presence_penalty):
            ids = torch.tensor(list(counts.keys()), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
            logits[row, ids] -= times * o.frequency_penalty + o.presence_penalty


def _bias(logits: Tensor, options: Sequence[Sampling]) -> None:
    entries = [(row, *pair) for row, o in enumerate(options) for pair in o.logit_bias]
    if entries:
        rows, ids, values = (list(column) for column in zip(*entries, strict=True))
        logits[rows, ids] += torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _hold_ends(logits: Tensor, choices: Sequence[Choice], options: Sequence[Sampling]) -> None:
    for row, (choice, o) in enumerate(zip(choices, options, strict=True)):
        if choice.drawn < o.min_tokens:
            logits[row, list(choice.request.ends)] = float("-inf")


def _apply(masks: Masks, logits: Tensor) -> None:
    """Forbid in all bound rows at once what their grammars do not allow."""
    vocabulary, rows = logits.shape[1], list(masks.rows)
    bits = np.unpackbits(masks.words.view(np.uint8), axis=1, count=vocabulary, bitorder="little")
    forbidden = torch.from_numpy(bits == 0).to(logits.device)
    logits[rows] = logits[rows].masked_fill(forbidden, float("-inf"))


def _shape(logits: Tensor, options: Sequence[Sampling]) -> Tensor:
    """Temperature and the three cuts; what is cut off becomes -inf."""

    def column(pick: Callable[[Sampling], float]) -> Tensor:
        return torch.tensor([pick(o) for o in options], device=logits.device)[:, None]

    logits = logits / column(lambda o: o.temperature)
    vocabulary = logits.shape[1]
    if any(0 < o.top_k < vocabulary for o in options):
        counts = column(lambda o: min(o.top_k or vocabulary, vocabulary)).long()
        largest = int(max(o.top_k for o in options if o.top_k < vocabulary))
        top = logits.topk(largest, -1).values
        floor = top.gather(1, (counts - 1).clamp(max=largest - 1))
        floor = floor.masked_fill(counts > largest, float("-inf"))
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if any(o.top_p < 1 for o in options):
        floor = _nucleus_floor(logits, column(lambda o: o.top_p))
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if any(o.min_p > 0 for o in options):
        floor = logits.amax(-1, keepdim=True) + column(lambda o: o.min_p).log()
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits


def _nucleus_floor(logits: Tensor, top_p: Tensor) -> Tensor:
    """[rows, 1]: the smallest logit that is kept; -inf where top_p is 1."""
    count = min(_CANDIDATES, logits.shape[1])
    total = logits.logsumexp(-1, keepdim=True)
    floor, reached = _floor_among(logits.topk(count, -1).values, total, top_p)
    flat = ((reached < top_p) & (top_p < 1))[:, 0]
    if count < logits.shape[1] and bool(flat.any()):
        whole = logits[flat].sort(-1, descending=True).values
        floor[flat], _ = _floor_among(whole, total[flat], top_p[flat])
    return floor.masked_fill(top_p >= 1, float("-inf"))


def _floor_among(top: Tensor, total: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Among each row's largest logits `top`, falling: the one that reaches top_p, or the last; and
    what all of them reach. Both [rows, 1]."""
    reached = (top - total).exp().cumsum(-1)
    needed = (reached < top_p).sum(-1, keepdim=True).clamp(max=top.shape[1] - 1)
    return top.gather(1, needed), reached[:, -1:]


def _invert(logits: Tensor, noise: Sequence[float]) -> Tensor:
    """For each row the id at which the cumulative distribution passes its uniform number. Sums of
    blocks first, then inside one block, so that nothing as long as the vocabulary is summed up
    one by one."""
    rows, vocabulary = logits.shape
    odds = (logits - logits.amax(-1, keepdim=True)).exp()
    odds = torch.nn.functional.pad(odds, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    passed = odds.sum(-1).double().cumsum(-1)
    aim = torch.tensor(noise, dtype=torch.float64, device=logits.device)[:, None]
    aim = aim * passed[:, -1:]
    block = torch.searchsorted(passed, aim, right=True).clamp(max=passed.shape[1] - 1)
    before = passed.gather(1, block) - odds.sum(-1).double().gather(1, block)
    inside = odds[torch.arange(rows, device=logits.device), block[:, 0]].double().cumsum(-1)
    rest = (aim - before).clamp(min=0.0).minimum(inside[:, -1:] * (1 - 1e-12))
    place = torch.searchsorted(inside, rest, right=True).clamp(max=_BLOCK - 1)
    return (block * _BLOCK + place)[:, 0]


def _scores(logits: Tensor, ids: Tensor, options: Sequence[Sampling]) -> list[TokenScore | None]:
    scores: list[TokenScore | None] = [None] * len(options)
    asked = [i for i, o in enumerate(options) if o.logprobs is not None]
    if not asked:
        return scores
    logprobs = logits[asked].log_softmax(-1)
    chosen = logprobs.gather(1, ids[asked][:, None])[:, 0].tolist()
    most = max(options[i].logprobs or 0 for i in asked)
    top = logprobs.topk(min(most, logprobs.shape[1]), -1)
    for i, own, values, places in zip(
        asked, chosen, top.values.tolist(), top.indices.tolist(), strict=True
    ):
        pairs = zip(places, values, strict=True)
        best = [pair for pair in pairs if pair[1] > float("-inf")]
        scores[i] = TokenScore(own, tuple(best[: options[i].logprobs]))
    return scores
