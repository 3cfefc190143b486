"""A CPU's decode steps: weights found again as blocks, attention compiled, answers unchanged."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from serve.engine import decoder, graphs
from serve.engine.attention_jit import compile_attention
from tests.engine_models import VOCABULARY, ended, engine_of, ids_of, request, run_all, tiny
from tests.test_engine_equality import check, prompts

RANDOM = np.random.default_rng(0)


def q4_1(rows: int, columns: int) -> graphs.Floats:
    """What a Q4_1 block holds once it is widened: scale and smallest value in fp16."""
    levels = RANDOM.integers(0, 16, (rows, columns // 32, 32))
    levels[..., 0], levels[..., 1] = 0, 15  # as its maker leaves them
    scales = (RANDOM.random((rows, columns // 32, 1)) * 0.01 + 1e-4).astype(np.float16)
    lows = (RANDOM.standard_normal(scales.shape) * 0.02).astype(np.float16)
    made = levels.astype(np.float32) * scales.astype(np.float32) + lows.astype(np.float32)
    return made.reshape(rows, columns)


def q4_0(rows: int, columns: int) -> graphs.Floats:
    levels = RANDOM.integers(-8, 8, (rows, columns // 32, 32))
    levels[..., 0] = -8
    scales = RANDOM.choice([-1, 1], (rows, columns // 32, 1)) * 0.01
    return (levels * scales.astype(np.float16)).astype(np.float32).reshape(rows, columns)


def q8_0(rows: int, columns: int) -> graphs.Floats:
    levels = RANDOM.integers(-127, 128, (rows, columns // 32, 32))
    levels[..., 0] = 127
    scales = (RANDOM.random((rows, columns // 32, 1)) * 0.01 + 1e-4).astype(np.float16)
    return (levels * scales.astype(np.float32)).astype(np.float32).reshape(rows, columns)


def plain(rows: int, columns: int) -> graphs.Floats:
    return RANDOM.standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("make", "bits", "is_exact"),
    [(q4_1, 4, True), (q4_0, 4, True), (q8_0, 8, True), (plain, 8, False)],
)
def test_a_products_error_is_that_of_its_8_bit_inputs(make: Any, bits: int, is_exact: bool) -> None:
    weight = make(96, 64)
    found = graphs.blocks(weight)
    assert (found.bits, found.is_exact) == (bits, is_exact)
    graph, bias = graphs.Graph(), plain(1, 96)[0]
    session = graph.session([("x", 64)], [graph.product("x", found, bias)], 1)
    for rows in (1, 2, 5):
        x = plain(rows, 64)
        exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        error = np.abs(session.run(None, {"x": x})[0] - exact).max() / np.abs(exact).max()
        assert error < 2e-2


def test_a_block_of_zeros_is_exact() -> None:
    assert graphs.blocks(np.zeros((4, 32), np.float32)).is_exact


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 3, 32)])
def test_attention_over_scattered_runs_matches_float64(heads: int, kv_heads: int, dim: int) -> None:
    attend = compile_attention(heads, kv_heads, dim)
    pieces = [[(0, 7), (40, 3)], [(20, 1)], [(64, 32), (8, 12), (30, 5)]]
    store = plain(128, 2 * kv_heads * dim).reshape(128, 2, kv_heads, dim)
    packed = plain(3, (heads + 2 * kv_heads) * dim).reshape(3, -1, dim)
    angles = RANDOM.random((3, dim // 2)) * 6
    cos, sin = (np.tile(f(angles), 2).astype(np.float32) for f in (np.cos, np.sin))
    slots = np.array([pieces[t][-1][0] + pieces[t][-1][1] - 1 for t in range(3)])
    before = packed.astype(np.float64)
    low, high = np.split(before[:, : heads + kv_heads], 2, -1)
    turned = before[:, : heads + kv_heads] * cos[:, None] + (
        np.concatenate([-high, low], -1) * sin[:, None]
    )
    out = np.full((3, heads, dim), np.nan, np.float32)
    flat = np.array([piece for runs in pieces for piece in runs]).T
    scratch = np.empty((heads, 64), np.float32), np.empty((heads, 64), np.int32)
    first = np.array([0, 2, 3, 6])
    starts, lengths = np.ascontiguousarray(flat)
    attend(packed, cos, sin, store, slots, first, starts, lengths, np.float32(0.3), out, *scratch)
    for t, runs in enumerate(pieces):
        seen = np.concatenate([np.arange(start, start + size) for start, size in runs])
        assert seen[-1] == slots[t]
        np.testing.assert_allclose(store[slots[t], 0], turned[t, heads:], atol=1e-5)
        np.testing.assert_array_equal(store[slots[t], 1], packed[t, heads + kv_heads :])
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
    monkeypatch.setattr(graphs, "_ACCURACY", 1)
    model = on_a_grid(tiny(family))
    engine = engine_of(model, packs_weights=True, kv_cache_gb=0.0005)
    assert model.forward.__func__ is decoder.Decoder.forward
    try:
        check(model, engine, prompts(5, [3, 40, 17, 1, 30, 9, 22]))
    finally:
        engine.close()


@pytest.mark.usefixtures("small_fit")
def test_a_seed_gives_the_same_ids_alone_and_beside_others() -> None:
    engine = engine_of(on_a_grid(tiny("llama")), packs_weights=True)
    draw = random.Random(3)
    asked = [
        request([draw.randrange(3, VOCABULARY) for _ in range(9)], seed=n, max_tokens=16)
        for n in range(4)
    ]
    try:
        together = [ids_of(messages) for messages in run_all(engine, asked)]
        alone = [ids_of(run_all(engine, [one])[0]) for one in asked]
    finally:
        engine.close()
    assert together == alone


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
