"""Triton kernels of what surrounds a layer's matrix products; fused.py launches and explains them.

The residual stream is float32, sums are float32, only what a matrix product reads is rounded.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _choose(
    x_ptr: Any,
    route_ptr: Any,
    route_bias_ptr: Any,
    HIDDEN: tl.constexpr,
    QUARTERED: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    STEP: tl.constexpr,
) -> Any:
    """Router logits [EP] of the row just stored at x_ptr (quartered like QUARTERED says)."""
    e = tl.arange(0, EP)
    c = tl.arange(0, STEP)
    acc = tl.zeros((EP, STEP), tl.float32)
    for at in range(0, HIDDEN, STEP):
        column = at + c
        here = column < HIDDEN
        place = column
        if QUARTERED:
            place = column // 4 + (column % 4) * (HIDDEN // 4)
        x = tl.load(x_ptr + place, mask=here, other=0.0).to(tl.float32)
        w = tl.load(
            route_ptr + e[:, None] * HIDDEN + column[None, :],
            mask=(e < E)[:, None] & here[None, :],
            other=0.0,
        )
        acc += w.to(tl.float32) * x[None, :]
    logits = tl.sum(acc, 1) + tl.load(route_bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    return tl.where(e < E, logits, float("-inf"))


@triton.jit
def _list(
    logits: Any,
    token: Any,
    counts_ptr: Any,
    pairs_ptr: Any,
    weights_ptr: Any,
    capacity: Any,
    EP: tl.constexpr,
    TOP_K: tl.constexpr,
) -> None:
    """Softmax over the top_k logits; the token enters the lists of their experts. The order within
    a list is that of arrival, which changes nothing in the results."""
    e = tl.arange(0, EP)
    best = tl.max(logits, 0)
    total = 0.0
    left = logits
    for _ in tl.static_range(TOP_K):
        highest = tl.max(left, 0)
        total += tl.exp(highest - best)
        left = tl.where(e == tl.argmax(left, 0), float("-inf"), left)
    left = logits
    for choice in tl.static_range(TOP_K):
        highest = tl.max(left, 0)
        expert = tl.argmax(left, 0)
        left = tl.where(e == expert, float("-inf"), left)
        pair = token * TOP_K + choice
        tl.store(weights_ptr + pair, tl.exp(highest - best) / total)
        place = tl.atomic_add(counts_ptr + expert, 1)
        tl.store(pairs_ptr + expert * capacity + place, pair)


@triton.jit(do_not_specialize=["capacity"])
def add_norm_kernel(
    residual_ptr: Any,
    parts_ptr: Any,
    bias_ptr: Any,
    weight_ptr: Any,
    out_ptr: Any,
    route_ptr: Any,
    route_bias_ptr: Any,
    slots_ptr: Any,
    counts_ptr: Any,
    pairs_ptr: Any,
    weights_ptr: Any,
    capacity: Any,
    outer_stride: Any,
    eps: Any,
    HIDDEN: tl.constexpr,
    PADDED: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUARTERED: tl.constexpr,
    ROUTE: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP_K: tl.constexpr,
    STEP: tl.constexpr,
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
    parts_ptr: Any,
    bias_ptr: Any,
    turns_ptr: Any,
    positions_ptr: Any,
    slots_ptr: Any,
    query_ptr: Any,
    keys_ptr: Any,
    values_ptr: Any,
    outer_stride: Any,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EACH: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    x_ptr: Any,
    weight_ptr: Any,
    out_ptr: Any,
    tokens: Any,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
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
