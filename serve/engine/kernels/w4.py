"""Linear layers over 4-bit AWQ and GPTQ checkpoints: a Triton product that widens as it reads.

Both formats hold eight 4-bit numbers in an int32, a scale and a zero point for each group of input
columns, and mean weight = (number - zero) * scale:

    gptq  qweight [in / 8, out]: eight neighbouring inputs of one output, lowest bits first
          qzeros [groups, out / 8] holds zero - 1 ("gptq") or zero ("gptq_v2"), scales [groups, out]
          g_idx [in], optional: the group of each input when columns were quantized out of order
    awq   qweight [in, out / 8]: eight outputs of one input, in the order 0 2 4 6 1 3 5 7
          qzeros [groups, out / 8] in the same order, scales [groups, out]

`W4` holds one layer in a common layout (repacked once, at load; the same size): bytes [out, in / 2]
of two neighbouring inputs, so that a row is read in one piece. Source of the layouts: AutoGPTQ's
and AutoAWQ's packing as transformers documents them. Knows no checkpoints; the loader calls it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Format = Literal["awq", "gptq", "gptq_v2"]
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where output j of eight sits in an AWQ int32, in steps of four bits."""

FEW = 384
PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class W4:
    """`packed` uint8 [out, in / 2], low four bits first; `scales` and `offsets` [groups, out] with
    weight = number * scale + offset; `order` int64 [in] or None: column c of the packed weight
    belongs to input order[c]."""

    packed: Tensor
    scales: Tensor
    offsets: Tensor
    group_size: int
    order: Tensor | None = None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[out, in], inputs in their own order."""
        numbers = torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1).float()
        scales, offsets = (
            part.float().T.repeat_interleave(self.group_size, 1)
            for part in (self.scales, self.offsets)
        )
        wide = (numbers * scales + offsets).to(dtype)
        if self.order is None:
            return wide
        return wide[:, torch.argsort(self.order)]


def repack(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    group_size: int,
    format: Format,
    g_idx: Tensor | None = None,
) -> W4:
    """From a checkpoint's tensors. Columns quantized out of order are sorted by group."""
    places = _AWQ_ORDER if format == "awq" else range(8)
    shifts = torch.tensor([4 * place for place in places], dtype=torch.int32, device=qweight.device)
    zeros = ((qzeros[..., None] >> shifts) & 15).flatten(1)
    if format == "gptq":
        zeros = zeros + 1
    if format == "awq":
        numbers = ((qweight[..., None] >> shifts) & 15).flatten(1).T
    else:
        numbers = ((qweight[:, None] >> shifts[:, None]) & 15).flatten(0, 1).T
    numbers = numbers.to(torch.uint8)
    inputs = numbers.shape[1]
    if group_size == -1:
        group_size = inputs
    order = None
    if g_idx is not None and not torch.equal(
        g_idx.long().cpu(), torch.arange(inputs) // group_size
    ):
        order = torch.argsort(g_idx.long(), stable=True)
        numbers = numbers[:, order]
    packed = (numbers[:, 0::2] | (numbers[:, 1::2] << 4)).contiguous()
    offsets = -(zeros.to(torch.float32) * scales.float()).to(scales.dtype)
    return W4(packed, scales.contiguous(), offsets.contiguous(), group_size, order)


def reference(x: Tensor, weight: W4, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the weight, in torch alone."""
    return functional.linear(x, weight.dequantized(x.dtype), bias)


def takes(inputs: int, group_size: int) -> bool:
    """Whether the kernels read such a layer: whole groups, cut in steps of a power of two."""
    half = group_size // 2
    step = min(half, 64)
    return inputs % group_size == 0 and step >= 16 and step & (step - 1) == 0 and half % step == 0


def w4_linear(x: Tensor, weight: W4, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out] in x's dtype. On a GPU by the kernels, else by the reference."""
    return fast(x, weight, bias) if x.is_cuda else reference(x, weight, bias)


def fast(x: Tensor, weight: W4, bias: Tensor | None = None) -> Tensor:
    """`w4_linear` by the kernels: few tokens read the weights packed, for many it pays to widen
    them once and leave the product to the GPU's own library."""
    few = x.numel() // x.shape[-1] <= FEW
    return product(x, weight, bias) if few else widened_product(x, weight, bias)


def widened_product(x: Tensor, weight: W4, bias: Tensor | None = None) -> Tensor:
    """As `fast` for many tokens; a piece of the weights is wide at a time."""
    flat = x.flatten(0, -2)
    if weight.order is not None:
        flat = flat[:, weight.order]
    outputs, inputs = weight.packed.shape[0], 2 * weight.packed.shape[1]
    step = min(outputs, max(64, PIECE_BYTES // (inputs * x.element_size()) // 64 * 64))
    wide = torch.empty((step, inputs), dtype=x.dtype, device=x.device)
    out = torch.empty((flat.shape[0], outputs), dtype=x.dtype, device=x.device)
    for first in range(0, outputs, step):
        end = min(first + step, outputs)
        widen(weight, first, wide[: end - first])
        own = None if bias is None else bias[first:end].to(x.dtype)
        out[:, first:end] = functional.linear(flat, wide[: end - first], own)
    return out.unflatten(0, x.shape[:-1])


def widen(weight: W4, first: int, out: Tensor) -> None:
    """out [rows, in] becomes the weight's rows from `first` on, columns as they are packed."""
    from serve.engine.kernels.w4_kernels import widen_kernel

    outputs, half = weight.packed.shape
    grid = (-(-out.shape[0] // 16), -(-half // 64))
    widen_kernel[grid](
        weight.packed, weight.scales, weight.offsets, out, first, out.shape[0], outputs, half,
        weight.group_size // 2, 16, 64, num_warps=4,
    )  # fmt: skip


def product(x: Tensor, weight: W4, bias: Tensor | None = None) -> Tensor:
    """As `fast` for few tokens."""
    from serve.engine.kernels.w4_kernels import w4_kernel

    flat = x.flatten(0, -2)
    if weight.order is not None:
        flat = flat[:, weight.order]
    # Even inputs, then odd ones: the kernel meets each with one half of the bytes.
    halves = torch.cat((flat[:, 0::2], flat[:, 1::2]), -1).contiguous()
    tokens, inputs = flat.shape
    outputs = weight.packed.shape[0]
    block, step = (16, 64) if tokens <= 16 else (64, 32)
    step = min(step, weight.group_size // 2)
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    grid = (-(-outputs // 64), -(-tokens // block))
    w4_kernel[grid](
        halves, weight.packed, weight.scales, weight.offsets, bias if bias is not None else out,
        out, tokens, outputs, inputs // 2, weight.group_size // 2, 64, block, step,
        bias is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out.unflatten(0, x.shape[:-1])
