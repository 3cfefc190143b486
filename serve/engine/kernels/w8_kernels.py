"""The Triton kernels behind w8.py: two 8-bit numbers a 16-bit word, widened in registers."""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# fmt: off
_WIDEN = """
lop3.b32 p, p, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 q, q, 0x00800080, 0xC300C300, 0xEA;
mov.b32 one, 0x3F803F80;
fma.rn.bf16x2 $0, p, one, q;
}
"""
# A number's low seven bits behind 0x43 read as bf16 128 + them; 128, or 256 for a negative one, is
# taken off again. All of it is exact.
_LOW = tl.constexpr("{\n.reg .b32 p, q, one;\nmov.b32 p, $1;\nmov.b32 q, $1;" + _WIDEN)
_HIGH = tl.constexpr("{\n.reg .b32 p, q, one;\nshr.u32 p, $1, 8;\nmov.b32 q, p;" + _WIDEN)


@triton.jit
def _byte(
    words: tl.tensor, HIGH: tl.constexpr, FAST: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """The low or high byte of every word as a signed number."""
    if FAST:
        return tl.inline_asm_elementwise(
            _HIGH if HIGH else _LOW, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif HIGH:
        return (words.to(tl.int32) >> 8).to(tl.float32).to(dtype)
    else:
        return ((words.to(tl.int32) << 24) >> 24).to(tl.float32).to(dtype)


@triton.jit(do_not_specialize=["tokens"])
def project8_kernel(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scales_ptr: tl.tensor, out_ptr: tl.tensor,
    tokens: tl.tensor, N: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    STEP: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
) -> None:
    """out[split] [tokens, N] = x [tokens, 2H] times rows of H words, one split of the words."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    split = tl.program_id(2)
    SHARE: tl.constexpr = ((H + SPLITS - 1) // SPLITS + STEP - 1) // STEP * STEP
    first = split * SHARE
    last = tl.minimum(H, first + SHARE)
    k = tl.arange(0, STEP)
    acc = tl.zeros((BN, BT), tl.float32)
    for k0 in tl.range(first, last, STEP, num_stages=STAGES):
        kk = k0 + k
        words = tl.load(
            words_ptr + n.to(tl.int64)[:, None] * H + kk[None, :],
            mask=(n < N)[:, None] & (kk < last)[None, :],
            other=0,
        )
        x = x_ptr + t[None, :] * (2 * H) + kk[:, None]
        there = (t < tokens)[None, :] & (kk < last)[:, None]
        low = tl.load(x, mask=there, other=0.0)
        high = tl.load(x + H, mask=there, other=0.0)
        acc = tl.dot(_byte(words, False, FAST, dtype), low, acc, input_precision="ieee")
        acc = tl.dot(_byte(words, True, FAST, dtype), high, acc, input_precision="ieee")
    acc *= tl.load(scales_ptr + n, mask=n < N, other=0.0)[:, None]
    out = out_ptr + (split * tokens + t).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, acc, mask=(n < N)[:, None] & (t < tokens)[None, :])


@triton.jit
def widen8_kernel(
    words_ptr: tl.tensor, scales_ptr: tl.tensor, out_ptr: tl.tensor, H: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """out [rows, 2H], a stretch of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * STEP + tl.arange(0, STEP)
    words = tl.load(words_ptr + row * H + k, mask=k < H, other=0)
    scale = tl.load(scales_ptr + row)
    out = out_ptr + row * (2 * H) + k
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    low = _byte(words, False, False, tl.float32) * scale
    high = _byte(words, True, False, tl.float32) * scale
    tl.store(out, low.to(dtype), mask=k < H)
    tl.store(out + H, high.to(dtype), mask=k < H)
