"""Drawing: row by row equal to a plain numpy reference, reproducible in any batch, fair."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.face import BlockingMailbox, GenerationRequest, Prompt
from serve.engine.sampling import draw, fill_masks, mix, uniform
from serve.engine.sequence import Request, Sequence
from serve.values import Sampling

V = 700
PROMPT = (3, 5, 5, 9)
ENDS = frozenset({1})


class Only:
    """A grammar's matcher that allows a fixed set of ids."""

    def __init__(self, allowed: set[int]) -> None:
        self.allowed = allowed

    def fill(self, bitmask: Any, row: int) -> bool:
        bitmask[row] = 0
        for token in self.allowed:
            bitmask[row, token // 32] |= np.int32(np.uint32(1 << (token % 32)).view(np.int32))
        return True

    def accept(self, token: int) -> None:
        assert token in self.allowed

    def is_finished(self) -> bool:
        return False


def choice(
    sampling: Sampling, drawn: tuple[int, ...] = (), seed: int = 7, allowed: set[int] | None = None
) -> Sequence:
    request = Request(
        1, GenerationRequest(Prompt(PROMPT), sampling), BlockingMailbox(), 100, ENDS, seed
    )
    made = Sequence(request, 0, [*PROMPT, *drawn], mix(seed))
    for token in drawn:
        made.counts[token] = made.counts.get(token, 0) + 1
    made.matcher = None if allowed is None else Only(allowed)
    request.sequences = [made]
    return made


def reference(logits: npt.NDArray[Any], one: Sequence) -> npt.NDArray[np.float64]:
    """The probabilities that the documentation promises, one row, in plain float64."""
    o = one.request.generation.sampling
    x = adjusted(logits.astype(np.float64), one)
    if o.temperature == 0:
        return np.asarray(np.arange(V) == np.argmax(x), np.float64)
    x = x / o.temperature
    if 0 < o.top_k < V:
        x[x < np.sort(x)[-o.top_k]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if o.top_p < 1:
        order = np.sort(p)[::-1]
        floor = order[min(int((np.cumsum(order) < o.top_p).sum()), V - 1)]
        x[p < floor] = -np.inf
    if o.min_p > 0:
        x[x < x.max() + math.log(o.min_p)] = -np.inf
    p = np.exp(x - x.max())
    return np.asarray(p / p.sum())


def adjusted(x: npt.NDArray[np.float64], one: Sequence) -> npt.NDArray[np.float64]:
    """Penalties, bias, held-back ends and the grammar."""
    o = one.request.generation.sampling
    if o.repetition_penalty != 1:
        for token in set(one.ids):
            up = x[token] < 0
            x[token] = x[token] * o.repetition_penalty if up else x[token] / o.repetition_penalty
    for token, count in one.counts.items():
        x[token] -= o.frequency_penalty * count + o.presence_penalty
    for token, bias in o.logit_bias:
        x[token] += bias
    if one.drawn < o.min_tokens:
        x[list(ENDS)] = -np.inf
    if isinstance(one.matcher, Only):
        x[[i for i in range(V) if i not in one.matcher.allowed]] = -np.inf
    return x


options = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 5, 50, 10**6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -1.5]),
    presence_penalty=st.sampled_from([0.0, 1.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.sampled_from([(), ((4, 3.0), (9, -100.0))]),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 0, 4, 20]),
)
rows = st.lists(
    st.tuples(
        options,
        st.sampled_from([(), (8,), (8, 8, 5)]),
        st.integers(0, 2**64 - 1),
        st.sampled_from([None, None, {2, 30, 31, 32, 640}]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(0, 1000), st.sampled_from([0.2, 2.0, 8.0]))
def test_every_row_is_drawn_as_the_reference_says(
    picked: list[Any], noise: int, spread: float
) -> None:
    choices = [choice(*row) for row in picked]
    logits = np.random.default_rng(noise).normal(0, spread, (len(choices), V)).astype(np.float32)
    masks = fill_masks(choices, V)
    draws = draw(torch.from_numpy(logits.copy()), choices, masks)
    for row, one, drawn in zip(logits, choices, draws, strict=True):
        p = reference(row, one)
        assert drawn.problem is None and p[drawn.token] > 0
        u = uniform(one.seed, one.drawn)
        below = p[: drawn.token].sum()
        if one.request.generation.sampling.temperature > 0:
            assert below - 1e-4 <= u <= below + p[drawn.token] + 1e-4
        check_score(one, drawn.score, drawn.token, p)


def check_score(one: Sequence, score: Any, token: int, p: npt.NDArray[np.float64]) -> None:
    o = one.request.generation.sampling
    if o.logprobs is None:
        assert score is None
        return
    if o.temperature > 0:
        assert score.logprob == pytest.approx(math.log(p[token]), abs=2e-3)
        best = np.sort(p[p > 0])[::-1][: o.logprobs]
        assert [q for _, q in score.top] == pytest.approx(np.log(best).tolist(), abs=2e-3)
    assert len(score.top) <= o.logprobs
    assert [q for _, q in score.top] == sorted((q for _, q in score.top), reverse=True)


def test_the_same_request_draws_the_same_alone_and_in_any_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, V) * 3
    choices = [choice(Sampling(temperature=1.0, top_p=0.9), seed=i % 7) for i in range(64)]
    together = [d.token for d in draw(logits.clone(), choices)]
    alone = [draw(logits[i : i + 1].clone(), [choices[i]])[0].token for i in range(64)]
    assert together == alone


def test_draws_follow_their_distribution() -> None:
    """Chi-square over 20,000 seeds and 12 ids; a right sampler fails once in 10,000 runs, and the
    seeds are fixed, so this one passes always or never."""
    torch.manual_seed(1)
    logits = torch.full((1, V), -30.0)
    logits[0, :12] = torch.randn(12)
    p = torch.softmax(logits[0], -1)[:12].numpy()
    counts = np.zeros(12)
    for first in range(0, 20_000, 500):
        choices = [choice(Sampling(), seed=first + i) for i in range(500)]
        for drawn in draw(logits.expand(500, V).clone(), choices):
            counts[drawn.token] += 1
    chi_square = float((((counts - 20_000 * p) ** 2) / (20_000 * p)).sum())
    assert chi_square < 37.4  # the 0.9999 quantile of chi-square with 11 degrees of freedom


def test_uniform_numbers_of_one_seed_are_even_and_independent_of_the_next_position() -> None:
    """Ten bins over 50,000 positions, and the lag-1 correlation within 4.5 standard errors."""
    numbers = np.array([uniform(12345, i) for i in range(50_000)])
    counts = np.histogram(numbers, 10, (0, 1))[0]
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 33.7  # 0.9999 quantile, 9 degrees
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4.5 / math.sqrt(50_000)


def test_numbers_that_are_not_finite_fail_their_row_only() -> None:
    logits = torch.zeros(4, V)
    logits[1, 3], logits[2, 5] = float("nan"), float("inf")
    draws = draw(logits, [choice(Sampling(temperature=t)) for t in (1.0, 1.0, 0.0, 0.0)])
    assert [d.problem is None for d in draws] == [True, False, False, True]


def test_a_row_that_may_say_nothing_is_a_problem_not_a_guess() -> None:
    one = choice(Sampling(min_tokens=5), allowed={1})
    (drawn,) = draw(torch.zeros(1, V), [one], fill_masks([one], V))
    assert drawn.problem is not None and "allow no token" in drawn.problem


def test_a_grammar_that_raises_fails_its_row_only() -> None:
    class Broken(Only):
        def fill(self, bitmask: Any, row: int) -> bool:
            raise ValueError("no")

    choices = [choice(Sampling()), choice(Sampling()), choice(Sampling(), allowed={4})]
    choices[1].matcher = Broken(set())
    draws = draw(torch.zeros(3, V), choices, fill_masks(choices, V))
    assert [d.problem is None for d in draws] == [True, False, True]
    assert draws[2].token == 4
