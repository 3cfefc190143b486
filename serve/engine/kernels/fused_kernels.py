"""Triton kernels of what surrounds a layer's matrix products; fused.py launches and explains them.

The residual stream is float32, sums are float32, only what a matrix product reads is rounded.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# fmt: off

@triton.jit
def _choose(
    x_ptr: tl.tensor, route_ptr: tl.tensor, route_bias_ptr: tl.tensor, HIDDEN: tl.constexpr,
    QUARTERED: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, STEP: tl.constexpr,
) -> tl.tensor:
    """Router logits [EP] of the row just stored at x_ptr (quartered like QUARTERED says)."""
    e = tl.arange(0, EP)
    c = tl.arange(0, STEP)
    acc = tl.zeros((EP, STEP), tl.float32)
    for at in tl.range(0, HIDDEN, STEP, num_stages=4):
        column = at + c
        here = column < HIDDEN
        w = tl.load(
            route_ptr + e[:, None] * HIDDEN + column[None, :],
            mask=(e < E)[:, None] & here[None, :], other=0.0,
        )
        place = column
        if QUARTERED:
            place = column // 4 + (column % 4) * (HIDDEN // 4)
        x = tl.load(x_ptr + place, mask=here, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
    logits = tl.sum(acc, 1) + tl.load(route_bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    return tl.where(e < E, logits, float("-inf"))


@triton.jit
def _list(
    logits: tl.tensor, token: tl.tensor, counts_ptr: tl.tensor, pairs_ptr: tl.tensor,
    weights_ptr: tl.tensor, capacity: tl.tensor, EP: tl.constexpr, TOP_K: tl.constexpr,
) -> None:
    """Softmax over the top_k logits; the token enters the lists of their experts. The order within
    a list is that of arrival, which changes nothing in the results."""
    e = tl.arange(0, EP)
    left = logits
    rank = tl.full((EP,), TOP_K, tl.int32)
    for choice in tl.static_range(TOP_K):
        expert = tl.argmax(left, 0)
        rank = tl.where(e == expert, choice, rank)
        left = tl.where(e == expert, float("-inf"), left)
    chosen = rank < TOP_K
    odds = tl.where(chosen, tl.exp(logits - tl.max(logits, 0)), 0.0)
    pair = token * TOP_K + rank
    tl.store(weights_ptr + pair, odds / tl.sum(odds, 0), mask=chosen)
    place = tl.atomic_add(counts_ptr + e, 1, mask=chosen)
    tl.store(pairs_ptr + e * capacity + place, pair, mask=chosen)


@triton.jit(do_not_specialize=["capacity"])
def list_kernel(
    logits_ptr: tl.tensor, slots_ptr: tl.tensor, counts_ptr: tl.tensor, pairs_ptr: tl.tensor,
    weights_ptr: tl.tensor, capacity: tl.tensor, E: tl.constexpr, EP: tl.constexpr,
    TOP_K: tl.constexpr,
) -> None:
    """`_list` from logits that a matrix product made."""
    token = tl.program_id(0)
    e = tl.arange(0, EP)
    row = logits_ptr + token.to(tl.int64) * E + e
    logits = tl.load(row, mask=e < E, other=float("-inf")).to(tl.float32)
    if tl.load(slots_ptr + token) >= 0:
        _list(logits, token, counts_ptr, pairs_ptr, weights_ptr, capacity, EP, TOP_K)


@triton.jit(do_not_specialize=["capacity"])
def add_norm_kernel(
    residual_ptr: tl.tensor, parts_ptr: tl.tensor, bias_ptr: tl.tensor, weight_ptr: tl.tensor,
    out_ptr: tl.tensor, route_ptr: tl.tensor, route_bias_ptr: tl.tensor, slots_ptr: tl.tensor,
    counts_ptr: tl.tensor, pairs_ptr: tl.tensor, weights_ptr: tl.tensor, capacity: tl.tensor,
    outer_stride: tl.tensor, eps: tl.tensor, HIDDEN: tl.constexpr, PADDED: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, QUARTERED: tl.constexpr,
    ROUTE: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, STEP: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, PADDED)
    here = c < HIDDEN
    row = residual_ptr + token * HIDDEN + c
    x = tl.load(row, mask=here, other=0.0)
    if OUTER > 0:
        for outer in tl.static_range(OUTER):
            for inner in tl.static_range(INNER):
                part = parts_ptr + outer * outer_stride + (token * INNER + inner) * HIDDEN + c
                x += tl.load(part, mask=here, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + c, mask=here, other=0.0).to(tl.float32)
        tl.store(row, x, mask=here)
    scale = tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + eps)
    x = x * scale * tl.load(weight_ptr + c, mask=here, other=0.0).to(tl.float32)
    place = c
    if QUARTERED:
        place = c // 4 + (c % 4) * (HIDDEN // 4)
    tl.store(out_ptr + token * HIDDEN + place, x.to(out_ptr.dtype.element_ty), mask=here)
    if ROUTE:
        tl.debug_barrier()  # the row is read back by other threads of this program
        logits = _choose(
            out_ptr + token * HIDDEN, route_ptr, route_bias_ptr, HIDDEN, QUARTERED, E, EP, STEP
        )
        if tl.load(slots_ptr + token) >= 0:
            _list(
                logits, token.to(tl.int32), counts_ptr, pairs_ptr, weights_ptr, capacity, EP, TOP_K
            )


@triton.jit
def rotate_kernel(
    parts_ptr: tl.tensor, bias_ptr: tl.tensor, turns_ptr: tl.tensor, positions_ptr: tl.tensor,
    slots_ptr: tl.tensor, query_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor,
    outer_stride: tl.tensor, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    EACH: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr,
) -> None:
    """EACH heads of one token: first all query heads, then the keys', then the values'."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * EACH + tl.arange(0, EACH)
    half = tl.arange(0, HALF)
    column = head[:, None] * (2 * HALF) + half[None, :]
    COLUMNS: tl.constexpr = (HEADS + 2 * KV_HEADS) * 2 * HALF
    first = tl.zeros((EACH, HALF), tl.float32)
    second = tl.zeros((EACH, HALF), tl.float32)
    for outer in tl.static_range(OUTER):
        part = parts_ptr + outer * outer_stride + token * COLUMNS + column
        first += tl.load(part).to(tl.float32)
        second += tl.load(part + HALF).to(tl.float32)
    if HAS_BIAS:
        first += tl.load(bias_ptr + column).to(tl.float32)
        second += tl.load(bias_ptr + column + HALF).to(tl.float32)
    slot = tl.load(slots_ptr + token)
    is_value = tl.program_id(1) * EACH >= HEADS + KV_HEADS
    if is_value:
        if slot >= 0:
            place = slot * (KV_HEADS * 2 * HALF) + column - (HEADS + KV_HEADS) * 2 * HALF
            tl.store(values_ptr + place, first.to(values_ptr.dtype.element_ty))
            tl.store(values_ptr + place + HALF, second.to(values_ptr.dtype.element_ty))
    else:
        turn = turns_ptr + tl.load(positions_ptr + token) * (2 * HALF) + half
        cosine = tl.load(turn)[None, :]
        sine = tl.load(turn + HALF)[None, :]
        one = first * cosine - second * sine
        two = second * cosine + first * sine
        if tl.program_id(1) * EACH < HEADS:
            place = token * (HEADS * 2 * HALF) + column
            tl.store(query_ptr + place, one.to(query_ptr.dtype.element_ty))
            tl.store(query_ptr + place + HALF, two.to(query_ptr.dtype.element_ty))
        elif slot >= 0:
            place = slot * (KV_HEADS * 2 * HALF) + column - HEADS * 2 * HALF
            tl.store(keys_ptr + place, one.to(keys_ptr.dtype.element_ty))
            tl.store(keys_ptr + place + HALF, two.to(keys_ptr.dtype.element_ty))


@triton.jit
def store_kernel(
    key_ptr: tl.tensor, value_ptr: tl.tensor, slots_ptr: tl.tensor, keys_ptr: tl.tensor,
    values_ptr: tl.tensor, token_stride: tl.tensor, head_stride: tl.tensor,
    value_token_stride: tl.tensor, value_head_stride: tl.tensor, HEADS: tl.constexpr,
    PADDED: tl.constexpr, DIM: tl.constexpr,
) -> None:
    """One token's keys and values to its slot."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED)[:, None]
    d = tl.arange(0, DIM)[None, :]
    slot = tl.load(slots_ptr + token)
    here = (head < HEADS) & (slot + 0 * head >= 0)
    place = slot * (HEADS * DIM) + head * DIM + d
    key = tl.load(key_ptr + token * token_stride + head * head_stride + d, mask=here, other=0.0)
    tl.store(keys_ptr + place, key.to(keys_ptr.dtype.element_ty), mask=here)
    value = value_ptr + token * value_token_stride + head * value_head_stride + d
    value = tl.load(value, mask=here, other=0.0)
    tl.store(values_ptr + place, value.to(values_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, tokens: tl.tensor, N: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    split = tl.program_id(2)
    SHARE: tl.constexpr = ((K + SPLITS - 1) // SPLITS + STEP - 1) // STEP * STEP
    first = split * SHARE
    last = tl.minimum(K, first + SHARE)
    k = tl.arange(0, STEP)
    acc = tl.zeros((BN, BT), tl.float32)
    for k0 in tl.range(first, last, STEP, num_stages=STAGES):
        kk = k0 + k
        w = tl.load(
            weight_ptr + n.to(tl.int64)[:, None] * K + kk[None, :],
            mask=(n < N)[:, None] & (kk < last)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + t[None, :] * K + kk[:, None],
            mask=(t < tokens)[None, :] & (kk < last)[:, None],
            other=0.0,
        )
        acc = tl.dot(w, x, acc, input_precision="ieee")
    out = out_ptr + (split * tokens + t).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, acc, mask=(n < N)[:, None] & (t < tokens)[None, :])
