"""The Triton kernels behind w4.w4_linear: 4-bit weights widened in registers, or once for many
tokens."""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


# fmt: off
@triton.jit(do_not_specialize=["tokens"])
def w4_kernel(
    x_ptr: tl.tensor, packed_ptr: tl.tensor, scales_ptr: tl.tensor, offsets_ptr: tl.tensor,
    bias_ptr: tl.tensor, out_ptr: tl.tensor, tokens: tl.tensor, N: tl.constexpr, H: tl.constexpr,
    GROUP: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """out [tokens, N] = x [tokens, 2H: even inputs, odd inputs] times bytes [N, H]; STEP bytes of a
    row at a time, never across a group of GROUP bytes, so one scale and offset a row and step."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    k = tl.arange(0, STEP)
    acc = tl.zeros((BN, BT), tl.float32)
    for at in range(0, H, STEP):
        kk = at + k
        packed = tl.load(
            packed_ptr + n.to(tl.int64)[:, None] * H + kk[None, :], mask=(n < N)[:, None], other=0
        )
        group = (at // GROUP) * N + n
        scale = tl.load(scales_ptr + group, mask=n < N, other=0.0).to(tl.float32)[:, None]
        offset = tl.load(offsets_ptr + group, mask=n < N, other=0.0).to(tl.float32)[:, None]
        low = ((packed & 15).to(tl.float32) * scale + offset).to(dtype)
        high = ((packed >> 4).to(tl.float32) * scale + offset).to(dtype)
        x = x_ptr + t.to(tl.int64)[None, :] * (2 * H) + kk[:, None]
        even = tl.load(x, mask=(t < tokens)[None, :], other=0.0)
        odd = tl.load(x + H, mask=(t < tokens)[None, :], other=0.0)
        acc = tl.dot(low, even, acc, input_precision="ieee")
        acc = tl.dot(high, odd, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, acc.to(dtype), mask=(n < N)[:, None] & (t < tokens)[None, :])


@triton.jit
def widen_kernel(
    packed_ptr: tl.tensor, scales_ptr: tl.tensor, offsets_ptr: tl.tensor, out_ptr: tl.tensor,
    first: tl.tensor, rows: tl.tensor, N: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, STEP: tl.constexpr,
) -> None:
    """out [rows, 2H]: the weights of rows first to first + rows."""
    own = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * STEP + tl.arange(0, STEP)
    here = (own < rows)[:, None] & (k < H)[None, :]
    n = (first + own).to(tl.int64)
    packed = tl.load(packed_ptr + n[:, None] * H + k[None, :], mask=here, other=0)
    group = (k // GROUP)[None, :] * N + n[:, None]
    scale = tl.load(scales_ptr + group, mask=here, other=0.0).to(tl.float32)
    offset = tl.load(offsets_ptr + group, mask=here, other=0.0).to(tl.float32)
    low = (packed & 15).to(tl.float32) * scale + offset
    high = (packed >> 4).to(tl.float32) * scale + offset
    pairs = tl.interleave(low, high).to(out_ptr.dtype.element_ty)
    kk = tl.program_id(1) * (2 * STEP) + tl.arange(0, 2 * STEP)
    out = out_ptr + own.to(tl.int64)[:, None] * (2 * H) + kk[None, :]
    tl.store(out, pairs, mask=(own < rows)[:, None] & (kk < 2 * H)[None, :])
