"""A CPU's decode steps: weights found again as blocks, attention compiled, answers unchanged."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from llvmlite import binding
from torch import nn

from serve.engine import decoder
from serve.engine.attention_jit import compile_attention, compile_placing
from serve.engine.blocks import Floats, blocks, packed
from serve.engine.face import BlockingMailbox, Message, Tokens
from serve.engine.products_jit import instructions, tile_product
from tests.engine_models import VOCABULARY, ended, engine_of, ids_of, request, run_all, tiny
from tests.test_engine_equality import check, prompts

RANDOM = np.random.default_rng(0)


def q4_1(rows: int, columns: int) -> Floats:
    """What a Q4_1 block holds once it is widened: scale and smallest value in fp16."""
    levels = RANDOM.integers(0, 16, (rows, columns // 32, 32))
    levels[..., 0], levels[..., 1] = 0, 15  # as its maker leaves them
    scales = (RANDOM.random((rows, columns // 32, 1)) * 0.01 + 1e-4).astype(np.float16)
    lows = (RANDOM.standard_normal(scales.shape) * 0.02).astype(np.float16)
    made = levels.astype(np.float32) * scales.astype(np.float32) + lows.astype(np.float32)
    return made.reshape(rows, columns)


def q4_0(rows: int, columns: int) -> Floats:
    levels = RANDOM.integers(-8, 8, (rows, columns // 32, 32))
    levels[..., 0] = -8
    scales = RANDOM.choice([-1, 1], (rows, columns // 32, 1)) * 0.01
    return (levels * scales.astype(np.float16)).astype(np.float32).reshape(rows, columns)


def q8_0(rows: int, columns: int) -> Floats:
    levels = RANDOM.integers(-127, 128, (rows, columns // 32, 32))
    levels[..., 0] = 127
    scales = (RANDOM.random((rows, columns // 32, 1)) * 0.01 + 1e-4).astype(np.float16)
    return (levels * scales.astype(np.float32)).astype(np.float32).reshape(rows, columns)


def plain(rows: int, columns: int) -> Floats:
    return RANDOM.standard_normal((rows, columns)).astype(np.float32)


KINDS = {"avx2": ("avx2",), "avxvnni": ("avx2", "avxvnni"),
         "avx512vnni": ("avx2", "avx512vnni")}  # fmt: skip
pytestmark = pytest.mark.skipif(instructions() is None, reason="not a processor it is for")


def rounded_inputs(x: Floats) -> tuple[Any, Floats]:
    """int8 [rows, in] and (scale, scale * sum) of each block, as step_jit.py makes them."""
    cells = x.reshape(len(x), -1, 32)
    scales = np.abs(cells).max(-1) / 127
    levels = np.rint(cells / scales[..., None]).astype(np.int8)
    sums = levels.sum(-1, dtype=np.float32) * scales
    return levels.reshape(x.shape), np.stack([scales, sums], -1).astype(np.float32)


def multiplied(kind: str, found: Any, x: Floats, rows: int) -> Floats:
    """x W' of one tile of 16 outputs, `rows` rows at a time."""
    levels, pairs = rounded_inputs(x)
    out = np.empty((len(x), 16), np.float32)
    product = tile_product(kind, found.bits, rows)
    compiled = numba.njit(lambda w, x, s, y, n: product(w, x, s, y, n))
    for low in range(0, len(x), rows):
        arrays = (found.data, levels[low:], pairs[low:], out[low:])
        compiled(*(array.ctypes.data for array in arrays), found.data.shape[1])
    return out


@pytest.mark.parametrize(
    ("make", "bits", "is_exact"),
    [(q4_1, 4, True), (q4_0, 4, True), (q8_0, 8, True), (plain, 8, False)],
)
def test_a_products_error_is_that_of_its_8_bit_inputs(make: Any, bits: int, is_exact: bool) -> None:
    """On every kind of processor, and to the bit the same however many rows are made at a time."""
    weight = make(13, 96)
    found = blocks(weight)
    assert (found.bits, found.is_exact) == (bits, is_exact)
    x = plain(8, 96)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    able = binding.get_host_cpu_features()
    made = []
    for kind, needed in KINDS.items():
        if all(able.get(name) for name in needed):
            made += [multiplied(kind, packed(found), x, rows) for rows in (1, 4, 8)]
    assert np.abs(made[0][:, :13] - exact).max() < 2e-2 * np.abs(exact).max()
    assert not made[0][:, 13:].any()
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


def test_a_block_of_zeros_is_exact() -> None:
    assert blocks(np.zeros((4, 32), np.float32)).is_exact


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 3, 32)])
def test_attention_over_scattered_runs_matches_float64(heads: int, kv_heads: int, dim: int) -> None:
    attend = compile_attention(heads, kv_heads, dim)
    place = compile_placing(heads, kv_heads, dim, False)
    pieces = [[(0, 7), (40, 3)], [(20, 1)], [(64, 32), (8, 12), (30, 5)]]
    store = plain(128, 2 * kv_heads * dim).reshape(128, 2, kv_heads, dim)
    tokens = plain(3, (heads + 2 * kv_heads) * dim).reshape(3, -1, dim)
    angles = RANDOM.random((3, dim // 2)) * 6
    cos, sin = (np.tile(f(angles), 2).astype(np.float32) for f in (np.cos, np.sin))
    slots = np.array([pieces[t][-1][0] + pieces[t][-1][1] - 1 for t in range(3)])
    before = tokens.astype(np.float64)
    low, high = np.split(before[:, : heads + kv_heads], 2, -1)
    turned = before[:, : heads + kv_heads] * cos[:, None] + (
        np.concatenate([-high, low], -1) * sin[:, None]
    )
    out = np.full((3, heads, dim), np.nan, np.float32)
    flat = np.array([piece for runs in pieces for piece in runs]).T
    scores = np.empty((heads, 64), np.float32)
    first = np.array([0, 2, 3, 6])
    starts, lengths = np.ascontiguousarray(flat)
    scale, norms = np.float32(0.3), np.zeros((2, 0), np.float32)
    for t in range(3):
        place(t, tokens, cos, sin, store, slots, norms, np.float32(0))
        for low, high in ((0, 1), (1, kv_heads)):
            attend(t, low, high, tokens, store, first, starts, lengths, scale, scores, out)
    for t, runs in enumerate(pieces):
        seen = np.concatenate([np.arange(start, start + size) for start, size in runs])
        assert seen[-1] == slots[t]
        np.testing.assert_allclose(store[slots[t], 0], turned[t, heads:], atol=1e-5)
        np.testing.assert_array_equal(store[slots[t], 1], tokens[t, heads + kv_heads :])
        for h in range(heads):
            keys, values = (
                store[seen, :, h // (heads // kv_heads)].astype(np.float64).swapaxes(0, 1)
            )
            weights = np.exp(keys @ turned[t, h] * 0.3)
            expected = weights @ values / weights.sum()
            np.testing.assert_allclose(out[t, h], expected, atol=1e-5)


def on_a_grid(model: Any) -> Any:
    """With every matrix as a Q4_1 file would hold it, so that blocks are exact."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                rows, columns = module.weight.shape
                made = torch.from_numpy(q4_1(rows, columns)) * 10
                module.weight.copy_(made)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(std=0.1)
    return model


@pytest.fixture
def small_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_MIN_WEIGHTS", 0)


@pytest.mark.usefixtures("small_fit")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_answers_are_those_of_generate_where_inputs_stay_exact(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks beside decodes, preemption, sequences that join and leave."""
    monkeypatch.setattr(decoder, "_TERMS", 3)
    monkeypatch.setattr(decoder, "_SHORT", 20)  # prompts of both kinds
    model = on_a_grid(tiny(family))
    engine = engine_of(model, packs_weights=True, kv_cache_gb=0.0005)
    assert model.forward.__func__ is decoder.Decoder.forward
    try:
        check(model, engine, prompts(5, [3, 40, 17, 1, 30, 9, 22]))
    finally:
        engine.close()


@pytest.mark.usefixtures("small_fit")
def test_a_seed_gives_the_same_ids_whatever_runs_beside_and_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights are rounded here, so that the stock model would give others; prompts are cut as the
    steps have room; their beginnings are in the cache, computed with and without a seed."""
    monkeypatch.setattr(decoder, "_SHORT", 8)
    engine = engine_of(tiny("llama"), packs_weights=True)
    draw = random.Random(3)
    asked = [
        request([draw.randrange(3, VOCABULARY) for _ in range(5 + 9 * n)], seed=n, max_tokens=16)
        for n in range(5)
    ]
    others = [request([*one.prompt.ids, 9], max_tokens=20) for one in asked]
    try:
        alone = [ids_of(run_all(engine, [one])[0]) for one in asked]
        run_all(engine, others)
        together = [ids_of(messages) for messages in run_all(engine, [*asked, *others])]
    finally:
        engine.close()
    assert together[: len(asked)] == alone
    fresh = engine_of(tiny("llama"), packs_weights=True)
    try:
        run_all(fresh, others)
        again = [ids_of(messages) for messages in run_all(fresh, [*others, *asked])]
    finally:
        fresh.close()
    assert again[len(others) :] == alone


@pytest.mark.usefixtures("small_fit")
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_any_number_of_threads_computes_the_same_and_none_is_waited_for(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "cores", lambda: threads)
    monkeypatch.setattr(decoder, "_MIN_BYTES", 1)
    model = on_a_grid(tiny("qwen3"))
    engine = engine_of(model, packs_weights=True)
    made = model.forward.__self__
    assert made._threads == threads
    asked = [request([5, 6, 7 + n], temperature=0.0, max_tokens=12) for n in range(5)]
    real = made._pool.submit
    late: list[Any] = []
    try:
        together = [ids_of(messages) for messages in run_all(engine, asked)]
        made._pool.submit = lambda *call: late.append(call)
        alone = [ids_of(messages) for messages in run_all(engine, asked)]
        for step, *arguments in late:
            logits = arguments[1].logits.copy()
            step(*arguments)  # whoever comes when all is done changes nothing
            np.testing.assert_array_equal(arguments[1].logits, logits)
    finally:
        made._pool.submit = real
        engine.close()
    assert together == alone
    assert len(late) % max(threads - 1, 1) == 0 and bool(late) == (threads > 1)
    assert len(made._step.signatures) == 1  # compiled at start, never while requests wait


@pytest.mark.usefixtures("small_fit")
def test_what_a_step_drew_is_delivered_while_the_next_one_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also while the stock model computes a long prompt; the last ids, after which nothing runs,
    come at once."""
    monkeypatch.setattr(decoder, "_SHORT", 8)
    engine = engine_of(tiny("llama"), packs_weights=True)
    seen: list[bool] = []

    class Box(BlockingMailbox):
        def post(self, messages: Sequence[Message]) -> None:
            seen.append(is_computing)
            super().post(messages)

    is_computing, run = False, engine._runner.run

    def watched(chunks: Any) -> Any:
        nonlocal is_computing
        is_computing = True
        try:
            return run(chunks)
        finally:
            is_computing = False

    monkeypatch.setattr(engine._runner, "run", watched)
    box = Box()
    try:
        engine.submit(request([5, 6, 7] * 5, temperature=0.0, max_tokens=9, n=3), box)
        drawn = sum(len(message.ids) for message in box if isinstance(message, Tokens))
    finally:
        engine.close()
    assert drawn == 27
    assert seen.count(False) == 1 and not seen[-1]


def test_a_containers_share_of_the_machine_bounds_the_threads(tmp_path: Path) -> None:
    seen = os.cpu_count() or 1
    for number, (text, expected) in enumerate(
        [("150000 100000", 1), ("max 100000", seen), ("6400000 100000", min(64, seen)), ("", seen)]
    ):
        (limit := tmp_path / str(number)).write_text(text)
        assert decoder.cores(limit) == expected
    assert decoder.cores(tmp_path / "none") == seen


@pytest.mark.usefixtures("small_fit")
def test_numbers_that_are_not_finite_end_their_own_request_only() -> None:
    model = on_a_grid(tiny("llama"))
    engine = engine_of(model, packs_weights=True)
    model.forward.__self__._embedding[9] = np.nan
    broken, whole = (request([5, 6, n], temperature=0.0, max_tokens=4) for n in (9, 7))
    try:
        expected = ids_of(run_all(engine, [whole])[0])
        failed, other = run_all(engine, [broken, whole])
    finally:
        engine.close()
    assert ended(failed).outcome == "failed"
    assert ids_of(other) == expected


@pytest.mark.usefixtures("small_fit")
@pytest.mark.parametrize("reason", ["another family", "weights not wanted", "bf16"])
def test_what_it_does_not_fit_keeps_the_stock_forward(reason: str) -> None:
    model = tiny("phi3" if reason == "another family" else "llama")
    if reason == "bf16":
        model = model.bfloat16()
    engine = engine_of(model, packs_weights=reason != "weights not wanted")
    try:
        messages = run_all(engine, [request([5, 6, 7], max_tokens=3)])[0]
    finally:
        engine.close()
    assert ended(messages).outcome == "finished"
    assert "forward" not in vars(model)
