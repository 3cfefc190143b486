"""The Triton kernels behind w4.w4_linear: 4-bit numbers widened in registers, or once for many
tokens.

A word of 16 bits holds four neighbouring columns, so nibble j of a tile meets columns 4q + j of the
activations, which `quarter_kernel` lays side by side for it. Numbers come out as n - 8, exactly; a
group's scale is applied to its sums, and its offset to the sum of its activations.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


# fmt: off
def _asm(shift: int, is_half: bool) -> tl.constexpr:
    """The nibble at `shift` of two words -> n - 8, twice. Behind the exponent bits of 1024 (of 128
    in bf16) a nibble reads as 1024 + n (128 + n)."""
    base, lower = ("0x64006400", "0x64086408") if is_half else ("0x43004300", "0xC308C308")
    subtract = "sub.rn.f16x2 $0, p, c;" if is_half else (
        ".reg .b32 one;\nmov.b32 one, 0x3F803F80;\nfma.rn.bf16x2 $0, p, one, c;"
    )
    return tl.constexpr(
        "{\n.reg .b32 p, c;\n" + f"shr.u32 p, $1, {shift};\n"
        f"lop3.b32 p, p, 0x000F000F, {base}, 0xEA;\nmov.b32 c, {lower};\n" + subtract + "\n}"
    )


_HALF_0, _HALF_1, _HALF_2, _HALF_3 = (_asm(4 * j, True) for j in range(4))
_BRAIN_0, _BRAIN_1, _BRAIN_2, _BRAIN_3 = (_asm(4 * j, False) for j in range(4))


@triton.jit
def _numbers(
    words: tl.tensor, J: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr, FAST: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """n - 8 of nibble J of every word."""
    if FAST and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            HALF, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    elif FAST:
        return tl.inline_asm_elementwise(
            BRAIN, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return (((words.to(tl.int32) >> (4 * J)) & 15) - 8).to(dtype)


@triton.jit
def quarter_kernel(
    x_ptr: tl.tensor, order_ptr: tl.tensor, out_ptr: tl.tensor, sums_ptr: tl.tensor,
    Q: tl.constexpr, STEP: tl.constexpr, HAS_ORDER: tl.constexpr,
) -> None:
    """4 STEP columns of a row of x: laid out for w4_kernel, and their sum."""
    token = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1)
    column = step * (4 * STEP) + tl.arange(0, 4 * STEP)
    source = column
    if HAS_ORDER:
        source = tl.load(order_ptr + column)
    x = tl.load(x_ptr + token * (4 * Q) + source)
    tl.store(out_ptr + token * (4 * Q) + column // 4 + (column % 4) * Q, x)
    tl.store(sums_ptr + token * (Q // STEP) + step, tl.sum(x.to(tl.float32), 0))


@triton.jit
def _add(
    acc: tl.tensor, n0: tl.tensor, n1: tl.tensor, n2: tl.tensor, n3: tl.tensor, x0: tl.tensor,
    x1: tl.tensor, x2: tl.tensor, x3: tl.tensor,
) -> tl.tensor:
    acc = tl.dot(n0, x0, acc, input_precision="ieee")
    acc = tl.dot(n1, x1, acc, input_precision="ieee")
    acc = tl.dot(n2, x2, acc, input_precision="ieee")
    return tl.dot(n3, x3, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def w4_kernel(
    x_ptr: tl.tensor, sums_ptr: tl.tensor, words_ptr: tl.tensor, scales_ptr: tl.tensor,
    offsets_ptr: tl.tensor, out_ptr: tl.tensor, tokens: tl.tensor, N: tl.constexpr, Q: tl.constexpr,
    GROUP: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, STEP: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
) -> None:
    """out[split] float32 [tokens, N] = x [tokens, 4Q, quartered] times rows of Q words, one split
    of the words; GROUP words share a scale and an offset, STEP are taken at a time."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    split = tl.program_id(2)
    STEPS: tl.constexpr = Q // STEP
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS * STEP
    first = split * SHARE
    k = tl.arange(0, STEP)
    held = n < N
    here = t < tokens
    acc = tl.zeros((BN, BT), tl.float32)
    for at in tl.range(first, tl.minimum(Q, first + SHARE), STEP, num_stages=STAGES):
        kk = at + k
        words = tl.load(
            words_ptr + n.to(tl.int64)[:, None] * Q + kk[None, :], mask=held[:, None], other=0
        )
        x = x_ptr + t.to(tl.int64)[None, :] * (4 * Q) + kk[:, None]
        x0 = tl.load(x, mask=here[None, :], other=0.0)
        x1 = tl.load(x + Q, mask=here[None, :], other=0.0)
        x2 = tl.load(x + 2 * Q, mask=here[None, :], other=0.0)
        x3 = tl.load(x + 3 * Q, mask=here[None, :], other=0.0)
        n0 = _numbers(words, 0, _HALF_0, _BRAIN_0, FAST, dtype)
        n1 = _numbers(words, 1, _HALF_1, _BRAIN_1, FAST, dtype)
        n2 = _numbers(words, 2, _HALF_2, _BRAIN_2, FAST, dtype)
        n3 = _numbers(words, 3, _HALF_3, _BRAIN_3, FAST, dtype)
        if GROUP >= STEP:
            own = (at // GROUP) * N + n
            scale = tl.load(scales_ptr + own, mask=held, other=0.0)[:, None]
            offset = tl.load(offsets_ptr + own, mask=held, other=0.0)[:, None] + 8 * scale
            total = tl.load(sums_ptr + t * STEPS + at // STEP, mask=here, other=0.0)[None, :]
            part = _add(tl.zeros((BN, BT), tl.float32), n0, n1, n2, n3, x0, x1, x2, x3)
            acc += part * scale + offset * total
        else:  # groups shorter than a product's least depth: every number gets its own
            own = (kk // GROUP)[None, :] * N + n[:, None]
            scale = tl.load(scales_ptr + own, mask=held[:, None], other=0.0)
            offset = tl.load(offsets_ptr + own, mask=held[:, None], other=0.0) + 8 * scale
            acc = _add(
                acc, (n0 * scale + offset).to(dtype), (n1 * scale + offset).to(dtype),
                (n2 * scale + offset).to(dtype), (n3 * scale + offset).to(dtype), x0, x1, x2, x3,
            )
    out = out_ptr + (split * tokens + t).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, acc, mask=held[:, None] & here[None, :])


@triton.jit(do_not_specialize=["tokens"])
def join_kernel(
    parts_ptr: tl.tensor, bias_ptr: tl.tensor, out_ptr: tl.tensor, tokens: tl.tensor,
    N: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    """out [tokens, N] = the sum of the parts, and of the bias, in out's type."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = n < N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + (split * tokens + token) * N + n, mask=here, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + n, total.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def widen_kernel(
    words_ptr: tl.tensor, scales_ptr: tl.tensor, offsets_ptr: tl.tensor, out_ptr: tl.tensor,
    first: tl.tensor, rows: tl.tensor, N: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr,
) -> None:
    """out [rows, 2H]: the weights of rows first to first + rows, of H bytes each."""
    own = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * STEP + tl.arange(0, STEP)
    here = (own < rows)[:, None] & (k < H)[None, :]
    n = (first + own).to(tl.int64)
    packed = tl.load(words_ptr + n[:, None] * H + k[None, :], mask=here, other=0)
    group = (k // GROUP)[None, :] * N + n[:, None]
    scale = tl.load(scales_ptr + group, mask=here, other=0.0).to(tl.float32)
    offset = tl.load(offsets_ptr + group, mask=here, other=0.0).to(tl.float32)
    low = (packed & 15).to(tl.float32) * scale + offset
    high = (packed >> 4).to(tl.float32) * scale + offset
    pairs = tl.interleave(low, high).to(out_ptr.dtype.element_ty)
    kk = tl.program_id(1) * (2 * STEP) + tl.arange(0, 2 * STEP)
    out = out_ptr + own.to(tl.int64)[:, None] * (2 * H) + kk[None, :]
    tl.store(out, pairs, mask=(own < rows)[:, None] & (kk < 2 * H)[None, :])
