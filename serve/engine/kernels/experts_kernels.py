"""Triton kernels of a mixture-of-experts layer over MXFP4 weights; experts.py launches them.

16 bits of the checkpoint hold four neighbouring columns, one per nibble, so nibble j of a whole
tile meets columns 4q + j of the activations, which are kept "quartered" for it (experts.quarter). A
tile of weights is widened in registers and is the left operand of the matrix product, tokens are
its columns, so that few tokens waste little. Loads of words and scales are wide enough for the
asynchronous copy engine; a change in how `m` is computed can silently lose that (look at the
compiled loop for convert_layout).
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# fmt: off
_SIGN_AND_VALUE = """
and.b32 p, p, z;
lop3.b32 p, q, 0x01C001C0, p, 0xEA;
fma.rn.bf16x2 $0, p, m, z;
}
"""


def _widen(place: str) -> tl.constexpr:
    """Two words -> the same nibble of both, as two bf16 in one register.

    A nibble's sign goes to bit 15 and its other three bits to bits 8..6 of a bf16, where they read
    as the E2M1 value times 2**-126 (subnormal included); `m` holds scale * 2**126, twice.
    """
    head = "{\n.reg .b32 p, q, m, z;\nmov.b32 z, 0x80008000;\nprmt.b32 m, $2, $3, 0x7610;\n"
    return tl.constexpr(head + place + _SIGN_AND_VALUE)


_WIDEN_0 = _widen("shl.b32 p, $1, 12;\nshl.b32 q, $1, 6;")
_WIDEN_1 = _widen("shl.b32 p, $1, 8;\nshl.b32 q, $1, 2;")
_WIDEN_2 = _widen("shl.b32 p, $1, 4;\nshr.u32 q, $1, 2;")
_WIDEN_3 = _widen("mov.b32 p, $1;\nshr.u32 q, $1, 6;")


@triton.jit
def _multiplier(scales: tl.tensor, COLUMNS: tl.constexpr, FAST: tl.constexpr) -> tl.tensor:
    """[rows, groups] scale bytes -> one multiplier for each word, [rows, groups * 8]."""
    rows: tl.constexpr = scales.shape[0]
    groups: tl.constexpr = scales.shape[1]
    if FAST:
        m = (scales.to(tl.int32) + 126) * 0x00800080
    else:
        bits = tl.where(scales == 0, 0x00400000, scales.to(tl.int32) << 23)
        m = bits.to(tl.float32, bitcast=True)
    return tl.reshape(tl.broadcast_to(m[:, :, None], (rows, groups, 8)), (rows, COLUMNS))


@triton.jit
def _nibble(
    words: tl.tensor, m: tl.tensor, J: tl.constexpr, PTX: tl.constexpr, FAST: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Nibble J of every word, widened to `dtype` and scaled."""
    if FAST:
        return tl.inline_asm_elementwise(
            PTX, "=r,r,r,r", [words, m], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        code = (words.to(tl.int32) >> (4 * J)) & 0xF
        bits = ((code & 8) << 28) | ((code & 7) << 22)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126, exact
        return (value * m).to(dtype)


@triton.jit
def _find(
    counts_ptr: tl.tensor, pairs_ptr: tl.tensor, capacity: tl.tensor, block: tl.tensor,
    E: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr,
) -> tl.tensor:
    """The expert of this block of tokens (E when there is none), its pairs, and which are real."""
    ids = tl.arange(0, EP)
    counts = tl.load(counts_ptr + ids, mask=ids < E, other=0)
    blocks = (counts + BT - 1) // BT
    expert = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    before = tl.sum(tl.where(ids < expert, blocks, 0), 0)
    count = tl.sum(tl.where(ids == expert, counts, 0), 0)
    t = (block - before) * BT + tl.arange(0, BT)
    real = t < count
    pairs = tl.load(pairs_ptr + expert * capacity + t, mask=real, other=0)
    return tl.minimum(expert, E), pairs, real


@triton.jit
def _load(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scales_ptr: tl.tensor, row: tl.tensor, real: tl.tensor,
    n: tl.tensor, at: tl.tensor, N: tl.constexpr, Q: tl.constexpr, GROUPS: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr,
) -> tl.tensor:
    """Weight rows `n` and activation rows `row`, words at..at + STEP of each: words, scales and
    the activations' four quarters. Rows beyond N, and with EDGE words beyond Q, read as zero."""
    k = at + tl.arange(0, STEP)
    g = at // 8 + tl.arange(0, STEP // 8)
    words_at = words_ptr + n[:, None] * Q + k[None, :]
    scales_at = scales_ptr + n[:, None] * GROUPS + g[None, :]
    there = real[None, :]
    if EDGE or N % BN != 0:
        held = (n < N)[:, None]
        words = tl.load(words_at, mask=held & (k < Q)[None, :], other=0)
        scales = tl.load(scales_at, mask=held & (g < GROUPS)[None, :], other=0)
        there = there & (k < Q)[:, None]
    else:
        words = tl.load(words_at)
        scales = tl.load(scales_at)
    x = x_ptr + row[None, :] * (4 * Q) + k[:, None]
    x0 = tl.load(x, mask=there, other=0.0)
    x1 = tl.load(x + Q, mask=there, other=0.0)
    x2 = tl.load(x + 2 * Q, mask=there, other=0.0)
    x3 = tl.load(x + 3 * Q, mask=there, other=0.0)
    return words, scales, x0, x1, x2, x3


@triton.jit
def _add(
    acc: tl.tensor, words: tl.tensor, scales: tl.tensor, x0: tl.tensor, x1: tl.tensor,
    x2: tl.tensor, x3: tl.tensor, STEP: tl.constexpr, FAST: tl.constexpr,
) -> tl.tensor:
    dtype: tl.constexpr = x0.dtype
    m = _multiplier(scales, STEP, FAST)
    acc = tl.dot(_nibble(words, m, 0, _WIDEN_0, FAST, dtype), x0, acc, input_precision="ieee")
    acc = tl.dot(_nibble(words, m, 1, _WIDEN_1, FAST, dtype), x1, acc, input_precision="ieee")
    acc = tl.dot(_nibble(words, m, 2, _WIDEN_2, FAST, dtype), x2, acc, input_precision="ieee")
    return tl.dot(_nibble(words, m, 3, _WIDEN_3, FAST, dtype), x3, acc, input_precision="ieee")


@triton.jit
def _multiply(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scales_ptr: tl.tensor, row: tl.tensor, real: tl.tensor,
    n: tl.tensor, split: tl.tensor, N: tl.constexpr, Q: tl.constexpr, GROUPS: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    FAST: tl.constexpr,
) -> tl.tensor:
    """[len(n), len(row)] float32: weight rows times activation rows over one split of the words.

    What is left beyond whole steps is small; with few tokens its loads go out before the loop and
    are used after it, so that nobody waits for them. Splits but the last multiply it by zero.
    """
    STEPS: tl.constexpr = Q // STEP
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS * STEP
    LEFT: tl.constexpr = Q - STEPS * STEP
    acc = tl.zeros((n.shape[0], row.shape[0]), tl.float32)
    TAIL: tl.constexpr = 16 if LEFT <= 16 else 32 if LEFT <= 32 else 64 if LEFT <= 64 else 128
    EARLY: tl.constexpr = LEFT > 0 and row.shape[0] <= 32
    mine = real
    if SPLITS > 1:
        mine = real & (split + row * 0 == SPLITS - 1)
    if EARLY:
        words, scales, x0, x1, x2, x3 = _load(
            x_ptr, words_ptr, scales_ptr, row, mine, n, STEPS * STEP,
            N, Q, GROUPS, BN, TAIL, True,
        )
    first = split * SHARE
    for at in tl.range(first, tl.minimum(STEPS * STEP, first + SHARE), STEP, num_stages=STAGES):
        w, s, y0, y1, y2, y3 = _load(
            x_ptr, words_ptr, scales_ptr, row, real, n, at, N, Q, GROUPS, BN, STEP, False
        )
        acc = _add(acc, w, s, y0, y1, y2, y3, STEP, FAST)
    if LEFT > 0:
        if not EARLY:
            words, scales, x0, x1, x2, x3 = _load(
                x_ptr, words_ptr, scales_ptr, row, mine, n, STEPS * STEP,
                N, Q, GROUPS, BN, TAIL, True,
            )
        acc = _add(acc, words, scales, x0, x1, x2, x3, TAIL, FAST)
    return acc


@triton.jit(do_not_specialize=["capacity"])
def gate_up_kernel(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scales_ptr: tl.tensor, bias_ptr: tl.tensor,
    out_ptr: tl.tensor, counts_ptr: tl.tensor, pairs_ptr: tl.tensor, capacity: tl.tensor,
    alpha: tl.constexpr, limit: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    GROUPS: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
) -> None:
    """out[pair] = quartered clamped SwiGLU of expert(pair)'s gate_up of x[token]. Gate rows are
    even, up rows odd."""
    tile = tl.program_id(0)
    expert, pairs, real = _find(counts_ptr, pairs_ptr, capacity, tl.program_id(1), E, EP, BT)
    if expert < E:
        n = tile * BN + tl.arange(0, BN)
        acc = _multiply(
            x_ptr, words_ptr + expert.to(tl.int64) * (N * Q),
            scales_ptr + expert.to(tl.int64) * (N * GROUPS), pairs // TOP_K, real, n, 0,
            N, Q, GROUPS, BN, STEP, STAGES, 1, FAST,
        )
        acc += tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        both = tl.permute(tl.reshape(acc, (BN // 2, 2, BT)), (0, 2, 1))
        gate, up = tl.split(both)
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        made = (up + 1) * gate * tl.sigmoid(alpha * gate)
        i = tile * (BN // 2) + tl.arange(0, BN // 2)
        column = i // 4 + (i % 4) * (N // 8)
        out = out_ptr + pairs.to(tl.int64)[None, :] * (N // 2) + column[:, None]
        kept = real[None, :] & (i < N // 2)[:, None]
        tl.store(out, made.to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["capacity", "total"])
def down_kernel(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scales_ptr: tl.tensor, bias_ptr: tl.tensor,
    out_ptr: tl.tensor, counts_ptr: tl.tensor, pairs_ptr: tl.tensor, weights_ptr: tl.tensor,
    capacity: tl.tensor, total: tl.tensor, N: tl.constexpr, Q: tl.constexpr, GROUPS: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
) -> None:
    """out[split, pair] = routing weight * (expert(pair)'s down of x[pair] over one split of the
    columns, plus the bias in split 0)."""
    tile = tl.program_id(0)
    split = tl.program_id(2)
    expert, pairs, real = _find(counts_ptr, pairs_ptr, capacity, tl.program_id(1), E, EP, BT)
    if expert < E:
        n = tile * BN + tl.arange(0, BN)
        acc = _multiply(
            x_ptr, words_ptr + expert.to(tl.int64) * (N * Q),
            scales_ptr + expert.to(tl.int64) * (N * GROUPS), pairs, real, n, split,
            N, Q, GROUPS, BN, STEP, STAGES, SPLITS, FAST,
        )
        bias = tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0)
        bias = tl.where(split == 0, bias.to(tl.float32), 0.0)
        weight = tl.load(weights_ptr + pairs, mask=real, other=0.0)
        made = (acc + bias[:, None]) * weight[None, :]
        place = (split * total + pairs).to(tl.int64)
        out = out_ptr + place[None, :] * N + n[:, None]
        kept = real[None, :] & (n < N)[:, None]
        tl.store(out, made.to(out_ptr.dtype.element_ty), mask=kept)
