"""Every Triton kernel, run by Triton's interpreter on the CPU, against torch in float64.

Random inputs, outputs poisoned with NaN beforehand. float32 inputs, so the bound of 1e-5 is the
kernels' arithmetic and not the rounding of inputs; bench/gpu has the bf16 figures on a GPU.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

# numpy, on which the interpreter stands, warns where a GPU goes to infinity in silence.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

from serve.engine.attention import Call
from serve.engine.attention import reference as attention_reference
from serve.engine.kernels import attention, experts, fused, mxfp4, w4, w8
from serve.engine.kernels.draws import draw, follow
from serve.engine.kernels.gpt_oss import Batch, FusedGptOss
from tests.test_mxfp4_loading import load, save, tiny

BOUND = 1e-5
CPU = torch.device("cpu")


def error(found: Tensor, exact: Tensor) -> float:
    """norm(found - exact) / norm(exact); NaN (over any bound) when an element was not written."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20)


# -- the format ------------------------------------------------------------------------------------


def test_mxfp4_bytes_mean_what_transformers_says_they_mean() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(mxfp4.dequantize(blocks, scales, torch.float32), theirs)


def test_quantizing_what_the_format_can_hold_changes_nothing() -> None:
    blocks = torch.randint(0, 256, (5, 4, 16), dtype=torch.uint8)
    blocks[..., 0] = 0x77  # a 6 in each group, so that the scale is determined
    scales = torch.randint(1, 250, (5, 4), dtype=torch.uint8)
    held = mxfp4.dequantize(blocks, scales, torch.float64)
    again = mxfp4.dequantize(*mxfp4.quantize(held.float()), torch.float64)
    fine = scales.repeat_interleave(32, 1) > 2  # below, float32 itself runs out
    assert torch.equal(held[fine], again[fine])


def test_a_number_rounds_to_its_nearest_neighbour_and_ties_to_the_even_code() -> None:
    row = torch.zeros(1, 32)
    given = [6.0, 5.0, 2.5, 1.75, 1.25, 0.75, 0.25, 3.5, -5.0, 0.2, 5.1, 7.9]
    row[0, : len(given)] = torch.tensor(given)
    row[0, len(given) - 1] = 6.4  # beyond 6 it is held at 6
    found = mxfp4.dequantize(*mxfp4.quantize(row), torch.float32)[0, : len(given)]
    assert found.tolist() == [6.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.0, 4.0, -4.0, 0.0, 6.0, 6.0]


# -- experts ---------------------------------------------------------------------------------------


def layer(count: int, hidden: int, middle: int) -> tuple[Any, Any]:
    return (
        experts.expert_weights(
            *mxfp4.quantize(torch.randn(count, 2 * middle, hidden)), torch.randn(count, 2 * middle)
        ),
        experts.expert_weights(
            *mxfp4.quantize(torch.randn(count, hidden, middle)), torch.randn(count, hidden)
        ),
    )


@pytest.mark.parametrize(
    ("tokens", "count", "hidden", "middle", "top_k"),
    [(1, 4, 64, 64, 2), (7, 5, 96, 64, 2), (21, 3, 320, 96, 3), (2, 6, 32, 32, 4)],
)
def test_experts_match_float64_with_ragged_and_empty_experts(
    tokens: int, count: int, hidden: int, middle: int, top_k: int
) -> None:
    gate_up, down = layer(count, hidden, middle)
    x = torch.randn(tokens, hidden)
    used = max(top_k, count - 1)  # one expert stays empty where the top_k leave room
    indices = torch.rand(tokens, used).argsort(-1)[:, :top_k]
    weights = torch.rand(tokens, top_k)
    exact = experts.reference(x.double(), indices, weights.double(), gate_up, down)
    found = experts.experts(x, experts.route(indices, weights, count), gate_up, down)
    assert error(found, exact) < BOUND


@pytest.mark.parametrize(
    "numbers", [(32, 16, 32, 2, 4, 1), (64, 32, 64, 3, 4, 2), (128, 64, 32, 2, 8, 3)]
)
def test_every_cut_of_the_down_product_gives_the_same(numbers: tuple[int, ...]) -> None:
    _, down = layer(3, 96, 160)
    indices = torch.rand(9, 3).argsort(-1)[:, :2]
    routing = experts.route(indices, torch.rand(9, 2), 3)
    x = torch.randn(18, 160)
    tile = experts.Tile(*numbers)
    out = poisoned(tile.splits, 18, 96)
    experts.down_product(experts.quarter(x), down, routing, out, tile)
    exact = torch.stack(
        [
            (x[i].double() @ down.dequantized(e, torch.float64).T + down.bias[e].double())
            * routing.weights.flatten()[i].double()
            for i, e in enumerate(indices.flatten().tolist())
        ]
    )
    assert error(out.sum(0), exact) < BOUND


def test_scales_beyond_the_packed_widening_take_the_plain_one() -> None:
    blocks = torch.randint(0, 256, (1, 8, 1, 16), dtype=torch.uint8)
    scales = torch.full((1, 8, 1), 130, dtype=torch.uint8)
    assert not experts.expert_weights(blocks, scales, torch.zeros(1, 8)).is_fast
    assert experts.expert_weights(blocks, scales - 2, torch.zeros(1, 8)).is_fast


# -- attention -------------------------------------------------------------------------------------


def cached(lengths: list[int], kv_heads: int, dim: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pools and tables for sequences of these lengths, blocks in random order."""
    columns = max(-(-length // size) for length in lengths) + 1
    tables = torch.randperm(len(lengths) * columns).int().view(len(lengths), columns)
    room = (tables.numel(), size, kv_heads, dim)
    return torch.randn(room), torch.randn(room), tables


def exact_attention(
    query: Tensor, pools: tuple[Tensor, Tensor], tables: Tensor, lengths: list[int],
    counts: list[int], call: Call,
) -> Tensor:  # fmt: skip
    made, at = [], 0
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        keys, values = (p[tables[i].long()].flatten(0, 1)[:length] for p in pools)
        position = torch.arange(length - count, length)[:, None]
        mask = torch.arange(length)[None] <= position
        if call.window is not None:
            mask &= torch.arange(length)[None] > position - call.window
        rows = query[at : at + count].transpose(0, 1)
        made.append(attention_reference(rows, keys, values, mask, call))
        at += count
    return torch.cat(made)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "has_sinks"),
    [(8, 2, 16, None, True), (6, 2, 16, 40, False), (4, 4, 64, 64, True), (14, 2, 16, 1, True)],
)
def test_decoding_sees_exactly_its_keys(
    splits: int, heads: int, kv_heads: int, dim: int, window: int | None, has_sinks: bool
) -> None:
    lengths = [1, 63, 64, 65, 200]
    keys, values, tables = cached(lengths, kv_heads, dim, 8)
    sinks = torch.randn(heads) if has_sinks else None
    query, out = torch.randn(5, heads, dim), poisoned(5, heads, dim)
    room = attention.Room.create(5, heads, dim, splits, CPU) if splits > 1 else None
    rule = attention.Rule(0.3, window, sinks)
    attention.decode(
        query, keys, values, tables, torch.tensor(lengths).int(), rule, out, splits, room
    )
    exact = exact_attention(
        query, (keys, values), tables, lengths, [1] * 5, Call(0.3, window, sinks)
    )
    assert error(out, exact) < BOUND


def test_a_padding_row_decodes_to_zeros() -> None:
    keys, values, tables = cached([4], 2, 16, 8)
    out = poisoned(1, 4, 16)
    rule = attention.Rule(1.0, None, torch.randn(4))
    none = torch.zeros(1, dtype=torch.int32)
    attention.decode(torch.randn(1, 4, 16), keys, values, tables, none, rule, out, 1, None)
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "has_sinks"),
    [(8, 2, None, True), (6, 2, 40, True), (4, 4, 7, False), (2, 1, None, False)],
)
def test_prompts_over_a_cache_see_exactly_their_keys(
    heads: int, kv_heads: int, window: int | None, has_sinks: bool
) -> None:
    lengths, counts = [5, 70, 129, 1], [5, 9, 100, 1]
    keys, values, tables = cached(lengths, kv_heads, 16, 8)
    sinks = torch.randn(heads) if has_sinks else None
    query, out = torch.randn(sum(counts), heads, 16), poisoned(sum(counts), heads, 16)
    start = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]).int()
    rule = attention.Rule(0.25, window, sinks)
    attention.prefill(
        query, keys, values, tables, start, torch.tensor(lengths).int(), rule, out, max(counts)
    )
    exact = exact_attention(
        query, (keys, values), tables, lengths, counts, Call(0.25, window, sinks)
    )
    assert error(out, exact) < BOUND


# -- what surrounds the products -------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "count", "top_k"), [(96, 6, 4), (320, 32, 2)])
def test_residual_norm_and_router_match_and_padding_is_routed_nowhere(
    hidden: int, count: int, top_k: int
) -> None:
    residual, parts = torch.randn(5, hidden), torch.randn(2, 15, hidden)
    bias, norm = torch.randn(hidden), torch.rand(hidden) + 0.5
    router_weight, router_bias = torch.randn(count, hidden), torch.randn(count)
    slots = torch.tensor([0, 1, -1, 3, 4])
    routing = experts.Routing(
        torch.zeros(count).int(), torch.full((count, 5), -1).int(), poisoned(5, top_k)
    )
    summed = residual.double() + parts.double().view(2, 5, 3, hidden).sum((0, 2)) + bias.double()
    normed = summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + 1e-5) * norm.double()
    out = poisoned(5, hidden)
    router = fused.Router(router_weight, router_bias, top_k, slots, routing)
    fused.add_norm_route(residual, fused.Parts(parts, 3, bias), norm, 1e-5, out, router)
    assert error(residual, summed) < BOUND
    assert error(experts.unquarter(out), normed) < BOUND
    best, indices = (normed @ router_weight.double().T + router_bias.double()).topk(top_k)
    real = slots >= 0
    assert error(routing.weights[real], best.softmax(-1)[real]) < BOUND
    for expert in range(count):
        mine = [
            t * top_k + k
            for t in range(5)
            for k in range(top_k)
            if real[t] and indices[t, k] == expert
        ]
        assert sorted(routing.pairs[expert, : routing.counts[expert]].tolist()) == mine


def test_the_router_alone_lists_what_the_fused_one_lists() -> None:
    x, weight, bias = torch.randn(9, 64), torch.randn(8, 64), torch.randn(8)
    routing = experts.Routing(torch.zeros(8).int(), torch.full((8, 9), -1).int(), poisoned(9, 2))
    router = fused.Router(weight, bias, 2, torch.arange(9), routing)
    fused.route(experts.quarter(x), router, experts.quarter(weight))
    best, indices = (x @ weight.T + bias).topk(2)
    assert error(routing.weights, best.softmax(-1)) < BOUND
    assert routing.counts.tolist() == torch.bincount(indices.flatten(), minlength=8).tolist()


def test_queries_and_keys_are_rotated_and_stored_where_the_slots_say() -> None:
    heads, kv_heads, dim, slots = 4, 2, 16, torch.tensor([0, 7, -1, 3, 12])
    parts, bias = torch.randn(3, 5, 8 * dim), torch.randn(8 * dim)
    turns, positions = torch.randn(50, dim), torch.tensor([3, 9, 1, 44, 0])
    query = poisoned(5, heads, dim)
    keys, values = torch.zeros(2, 4, 4, kv_heads, dim)
    fused.rotate_and_store(
        fused.Parts(parts, 1, bias), turns, positions, slots, query, keys, values
    )
    whole = (parts.double().sum(0) + bias.double()).view(5, 8, dim)
    cosine, sine = turns[positions].double()[:, None].chunk(2, -1)
    first, second = whole[:, : heads + kv_heads].chunk(2, -1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
    assert error(query, turned[:, :heads]) < BOUND
    real = slots >= 0
    for pool, exact in ((keys, turned[:, heads:]), (values, whole[:, heads + kv_heads :])):
        stored = torch.zeros(16, kv_heads, dim, dtype=torch.float64)
        stored[slots[real]] = exact[real]
        assert error(pool.flatten(0, 1), stored) < BOUND


def test_a_stock_models_keys_are_stored_from_any_layout() -> None:
    key = torch.randn(5, 3, 16).transpose(0, 1)
    value = torch.randn(3, 5, 16)
    keys, values = torch.zeros(2, 4, 4, 3, 16)
    slots = torch.tensor([2, -1, 9, 0, 15])
    fused.store(key, value, slots, keys, values)
    real = slots >= 0
    for pool, given in ((keys, key), (values, value)):
        stored = torch.zeros(16, 3, 16)
        stored[slots[real]] = given.transpose(0, 1)[real]
        assert torch.equal(pool.flatten(0, 1), stored)


@pytest.mark.parametrize("cut", [fused.Cut(32, 16, 3, 2, 4), fused.Cut(64, 128, 1, 3, 4)])
def test_a_skinny_product_is_the_sum_of_its_parts(cut: fused.Cut) -> None:
    x, weight = torch.randn(5, 100), torch.randn(70, 100)
    out = poisoned(cut.splits, 5, 70)
    fused.project(x, weight, out, cut)
    assert error(out.sum(0), x.double() @ weight.double().T) < BOUND


def test_draws_follow_the_cumulative_distribution_and_faults_are_told() -> None:
    logits, noise = torch.randn(40, 9001) * 4, torch.rand(40)
    temperatures = torch.rand(40) * 1.5 + 0.2
    temperatures[:5] = 0
    noise[6], noise[7] = 0.0, 1 - 2**-24
    logits[8, 77], logits[9], logits[10] = float("nan"), float("-inf"), float("-inf")
    logits[10, 5] = 1.0
    out = torch.full((40,), -7)
    draw(logits, temperatures, noise, out)
    assert out[:5].tolist() == logits[:5].argmax(-1).tolist()
    assert out[8:11].tolist() == [-1, -1, 5]
    for row in (5, 6, 7, *range(11, 40)):
        odds = (logits[row].double() / temperatures[row].double()).softmax(-1)
        before, after = odds[: out[row]].sum(), odds[: out[row] + 1].sum()
        assert before - 1e-5 <= noise[row] <= after + 1e-5


# -- 4-bit linear layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(
    ("group", "in_order"), [(128, True), (64, True), (32, True), (128, False), (384, False)]
)
def test_four_bit_layers_compute_what_their_numbers_mean(
    group: int, in_order: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, inputs = 72, 384
    order = None if in_order else torch.randperm(inputs)
    numbers = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    packed = numbers[:, 0::2] | (numbers[:, 1::2] << 4)
    scales, offsets = torch.rand(2, inputs // group, outputs) + 0.1
    held = w4.W4(packed.contiguous(), scales, offsets - 3, group, order)
    exact = numbers.double() * scales.T.repeat_interleave(group, 1)
    exact += (offsets - 3).T.repeat_interleave(group, 1)
    if order is not None:
        exact = exact[:, torch.argsort(order)]
    x, bias = torch.randn(tokens, inputs), torch.randn(outputs)
    wanted = x.double() @ exact.T + bias.double()
    assert w4.takes(inputs, group)
    assert error(held.dequantized(torch.float64), exact) < BOUND
    assert error(w4.product(x, held, bias), wanted) < BOUND
    assert error(w4.product(x, held), wanted - bias) < BOUND
    monkeypatch.setattr(w4, "PIECE_BYTES", 64 * inputs * 4)  # two pieces, the second not whole
    assert error(w4.widened_product(x, held, bias), wanted) < BOUND
    assert error(w4.w4_linear(x[None], held, bias), wanted[None]) < BOUND


@pytest.mark.parametrize(
    ("inputs", "group", "is_taken"),
    [(128, 16, True), (96, 32, False), (5120, 128, True), (5120, 5120, True), (200, 100, False)],
)
def test_layers_that_cannot_be_cut_in_steps_are_not_taken(
    inputs: int, group: int, is_taken: bool
) -> None:
    assert w4.takes(inputs, group) == is_taken


# -- 8-bit matrices --------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [fused.Cut(32, 16, 3, 2, 4), fused.Cut(64, 64, 1, 3, 4)])
def test_a_product_with_8_bit_rows_is_that_of_the_numbers_they_hold(cut: fused.Cut) -> None:
    x, weight = torch.randn(5, 200), torch.randn(70, 200) * torch.rand(70, 1)
    weight[3], weight[4, 7] = 0, -9
    held = w8.hold(weight)
    rounded = held.dequantized(torch.float64)
    assert (rounded - weight).abs().max(1).values.le(weight.abs().amax(1) / 254 * 1.0001).all()
    out = poisoned(cut.splits, 5, 70)
    w8.project(x, held, out, cut)
    assert error(out.sum(0), x.double() @ rounded.T) < BOUND


def test_8_bit_rows_hold_every_number_and_a_layer_of_them_stands_in_for_the_stock_one() -> None:
    whole = torch.stack((torch.arange(-127, 129), torch.arange(128, -128, -1))).float()
    whole[whole == 128] = 127
    held = w8.hold(whole)
    assert torch.equal(held.dequantized(torch.float32), whole)
    x, bias = torch.randn(2, 3, 256), torch.randn(2)
    made = w8.Linear8Rows(held, bias)(x)
    assert torch.equal(made, torch.nn.functional.linear(x, whole, bias))


# -- the whole model -------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_bits", [16, 8])
def test_fused_gpt_oss_gives_the_stock_models_logits(dense_bits: int, tmp_path: Path) -> None:
    stock = tiny()
    save(stock, tmp_path)
    ids = torch.randint(0, 97, (15,))
    loaded = load(tmp_path)
    if dense_bits == 8:
        assert w8.hold_dense(stock) == w8.hold_dense(loaded) > 0
    with torch.no_grad():
        exact = stock(ids[None]).logits[0]
    pools = [{i: torch.zeros(40, 4, 2, 16) for i in range(2)} for _ in range(2)]
    fast = FusedGptOss(loaded, pools[0], pools[1], {0: 0, 1: 1}, 64)
    tables = [torch.randperm(40).int()[:12] for _ in range(2)]

    def step(start: int, end: int) -> Tensor:
        place = torch.arange(start, end)
        batch = Batch(
            ids=ids[start:end],
            positions=place,
            slots=tuple(table.long()[place // 4] * 4 + place % 4 for table in tables),
            tables=tuple(table[None] for table in tables),
            lengths=torch.tensor([end]).int(),
            query_start=torch.tensor([0, end - start]).int(),
            decodes=int(end - start == 1),
            longest=end - start,
        )
        return fast.forward(batch, None)

    found = torch.cat([step(0, 10), step(10, 11), step(11, 15)])
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-5)
    assert torch.equal(found.argmax(-1), exact.argmax(-1))


def run_clean(script: str, *arguments: str) -> str:
    """A script beside this file, in a process of its own, since this one interprets."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *arguments],
        env=clean, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90])
def test_every_kernel_compiles_for(capability: int) -> None:
    assert run_clean("kernel_recorder.py", str(capability)).count("compiled") >= 14


def test_no_step_waits_for_a_kernel_that_was_not_compiled_at_start() -> None:
    assert run_clean("kernel_variants.py", "gpt_oss", "llama") == ""


def test_a_row_follows_what_another_drew_or_keeps_the_id_it_was_given() -> None:
    drawn = torch.tensor([40, -1, 42, 2**40])
    sources = torch.tensor([3, -1, 1, 0, -1])
    ids = torch.full((5,), -9)
    follow(torch.tensor([1, 2, 3, 4, 5]), sources, drawn, ids)
    assert ids.tolist() == [2**40, 2, 0, 40, 5], "an id that could not be drawn is read as 0"
