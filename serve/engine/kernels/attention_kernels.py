"""Triton kernels of the paged attention; attention.py launches them and says what they compute.

Scores are kept in units of log 2 (scale holds log2 e), so exponentials are exp2. Addresses into the
pools are 64-bit: a pool may pass 2**31 elements.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# fmt: off
LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1.0e30)


@triton.jit
def _attend(
    q: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, table_ptr: tl.tensor, at: tl.tensor,
    end: tl.tensor, last: tl.tensor, best: tl.tensor, total: tl.tensor, acc: tl.tensor,
    scale: tl.tensor, KV_HEADS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tensor:
    """Fold keys at..at + BLOCK into a running softmax: row r sees keys up to last[r] (and below
    `end`); only where MASKED is that looked at."""
    d = tl.arange(0, DIM)
    place = at + tl.arange(0, BLOCK)
    there = place < end
    page = tl.load(table_ptr + place // SIZE, mask=there, other=0).to(tl.int64)
    token = (page * SIZE + place % SIZE) * (KV_HEADS * DIM)
    k = tl.load(keys_ptr + token[None, :] + d[:, None], mask=there[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if MASKED:
        seen = (place[None, :] <= last[:, None]) & there[None, :]
        if WINDOW > 0:
            seen = seen & (place[None, :] > last[:, None] - WINDOW)
        scores = tl.where(seen, scores, NEVER)
    highest = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    fade = tl.exp2(best - highest)
    v = tl.load(values_ptr + token[:, None] + d[None, :], mask=there[:, None], other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return highest, total * fade + tl.sum(weights, 1), acc


@triton.jit
def _finish(
    best: tl.tensor, total: tl.tensor, acc: tl.tensor, sink: tl.tensor, HAS_SINK: tl.constexpr,
) -> tl.tensor:
    """The softmax's quotient, the sink counted in; rows that saw nothing give 0."""
    if HAS_SINK:
        highest = tl.maximum(best, sink)
        fade = tl.exp2(best - highest)
        total = total * fade + tl.exp2(sink - highest)
        acc = acc * fade[:, None]
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    query_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, tables_ptr: tl.tensor,
    lengths_ptr: tl.tensor, sinks_ptr: tl.tensor, out_ptr: tl.tensor, parts_ptr: tl.tensor,
    sums_ptr: tl.tensor, table_stride: tl.tensor, scale: tl.tensor, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    SIZE: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SINK: tl.constexpr,
) -> None:
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + sequence)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    blocks = (length - first + BLOCK - 1) // BLOCK
    share = (blocks + SPLITS - 1) // SPLITS * BLOCK
    low = first + split * share
    high = tl.minimum(low + share, length)
    rows = tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    head = kv_head * GROUP + rows
    held = rows < GROUP
    place = (sequence * HEADS + head).to(tl.int64)
    q = tl.load(query_ptr + place[:, None] * DIM + d[None, :], mask=held[:, None], other=0.0)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    last = tl.full((ROWS,), 0, tl.int32) + length - 1
    best = tl.full((ROWS,), NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    offset = kv_head * DIM
    for at in range(low, high, BLOCK):
        best, total, acc = _attend(
            q,
            keys_ptr + offset,
            values_ptr + offset,
            table_ptr,
            at,
            length,
            last,
            best,
            total,
            acc,
            scale,
            KV_HEADS,
            DIM,
            SIZE,
            WINDOW,
            BLOCK,
            True,
        )
    if SPLITS == 1:
        sink = best
        if HAS_SINK:
            sink = tl.load(sinks_ptr + head, mask=held, other=0.0).to(tl.float32) * LOG2E
        made = _finish(best, total, acc, sink, HAS_SINK)
        made = tl.where(length > 0, made, 0.0)
        out = out_ptr + place[:, None] * DIM + d[None, :]
        tl.store(out, made.to(out_ptr.dtype.element_ty), mask=held[:, None])
    else:
        part = place * SPLITS + split
        tl.store(parts_ptr + part[:, None] * DIM + d[None, :], acc, mask=held[:, None])
        tl.store(sums_ptr + part * 2, best, mask=held)
        tl.store(sums_ptr + part * 2 + 1, total, mask=held)


@triton.jit
def join_kernel(
    parts_ptr: tl.tensor, sums_ptr: tl.tensor, sinks_ptr: tl.tensor, out_ptr: tl.tensor,
    lengths_ptr: tl.tensor, HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    PADDED: tl.constexpr, HAS_SINK: tl.constexpr,
) -> None:
    """The parts of one sequence and head, brought to their common maximum and added."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    s = tl.arange(0, PADDED)
    d = tl.arange(0, DIM)
    part = (sequence * HEADS + head).to(tl.int64) * SPLITS + s
    best = tl.load(sums_ptr + part * 2, mask=s < SPLITS, other=NEVER)
    total = tl.load(sums_ptr + part * 2 + 1, mask=s < SPLITS, other=0.0)
    acc = tl.load(
        parts_ptr + part[:, None] * DIM + d[None, :], mask=(s < SPLITS)[:, None], other=0.0
    )
    highest = tl.max(best, 0)
    if HAS_SINK:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    fade = tl.exp2(best - highest)
    whole = tl.sum(total * fade, 0)
    if HAS_SINK:
        whole += tl.exp2(sink - highest)
    made = tl.sum(acc * fade[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    made = tl.where(tl.load(lengths_ptr + sequence) > 0, made, 0.0)
    out = out_ptr + (sequence * HEADS + head).to(tl.int64) * DIM + d
    tl.store(out, made.to(out_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=["table_stride"],
    # These three begin behind the step's decodes: a new number of those is no new kernel.
    do_not_specialize_on_alignment=["tables_ptr", "start_ptr", "lengths_ptr"],
)
def prefill_kernel(
    query_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, tables_ptr: tl.tensor,
    start_ptr: tl.tensor, lengths_ptr: tl.tensor, sinks_ptr: tl.tensor, out_ptr: tl.tensor,
    table_stride: tl.tensor, scale: tl.tensor, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, HAS_SINK: tl.constexpr,
) -> None:
    """One tile: ROWS / PADDED tokens of one sequence, the query heads of one key head each."""
    TOKENS: tl.constexpr = ROWS // PADDED
    sequence = tl.program_id(2)
    kv_head = tl.program_id(1)
    start = tl.load(start_ptr + sequence)
    count = tl.load(start_ptr + sequence + 1) - start
    length = tl.load(lengths_ptr + sequence)
    # The last tiles see the most keys: start them first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * TOKENS < count:
        row = tl.arange(0, ROWS)
        d = tl.arange(0, DIM)
        token = tile * TOKENS + row // PADDED
        head = kv_head * GROUP + row % PADDED
        held = (token < count) & (row % PADDED < GROUP)
        place = ((start + token) * HEADS + head).to(tl.int64)
        q = tl.load(query_ptr + place[:, None] * DIM + d[None, :], mask=held[:, None], other=0.0)
        past = length - count
        last = past + token
        lowest = past + tile * TOKENS
        end = tl.minimum(lowest + TOKENS, length)
        low = 0
        if WINDOW > 0:
            low = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK * BLOCK
        free = lowest // BLOCK * BLOCK  # keys below are seen by every row of a full layer
        table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
        best = tl.full((ROWS,), NEVER, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, DIM), tl.float32)
        keys = keys_ptr + kv_head * DIM
        values = values_ptr + kv_head * DIM
        for at in range(low, free, BLOCK):
            best, total, acc = _attend(
                q,
                keys,
                values,
                table_ptr,
                at,
                end,
                last,
                best,
                total,
                acc,
                scale,
                KV_HEADS,
                DIM,
                SIZE,
                WINDOW,
                BLOCK,
                WINDOW > 0,
            )
        for at in range(free, end, BLOCK):
            best, total, acc = _attend(
                q,
                keys,
                values,
                table_ptr,
                at,
                end,
                last,
                best,
                total,
                acc,
                scale,
                KV_HEADS,
                DIM,
                SIZE,
                WINDOW,
                BLOCK,
                True,
            )
        sink = best
        if HAS_SINK:
            sink = tl.load(sinks_ptr + head, mask=held, other=0.0).to(tl.float32) * LOG2E
        made = _finish(best, total, acc, sink, HAS_SINK)
        out = out_ptr + place[:, None] * DIM + d[None, :]
        tl.store(out, made.to(out_ptr.dtype.element_ty), mask=held[:, None])
