"""Linear layers over 4-bit numbers in groups: a Triton product that widens as it reads.

weight = number * scale + offset, scale and offset shared by a group of neighbouring input columns,
which is what AWQ and GPTQ files mean in their own packings (quantization/linear4.py turns those
into `W4`, once, at load; the same size). Few tokens read the packed numbers: activations are laid
out for them in one launch, which also sums what each group's offset is multiplied by. For many it
pays to widen once and leave the product to the GPU's own library. Knows no checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FEW = 192
PIECE_BYTES = 64 * 2**20
_PROGRAMS = 264
"""Two for each of an H100's processors; fewer leave some waiting for memory."""


@dataclass(frozen=True, slots=True)
class W4:
    """`packed` uint8 [out, in / 2], two neighbouring inputs a byte, the first in the low bits;
    `scales` and `offsets` float32 [groups, out]; `order` int64 [in] or None: column c of the packed
    weight belongs to input order[c]."""

    packed: Tensor
    scales: Tensor
    offsets: Tensor
    group_size: int
    order: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.packed.shape[0]

    @property
    def inputs(self) -> int:
        return 2 * self.packed.shape[1]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[out, in], inputs in their own order."""
        numbers = torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1).float()
        scales, offsets = (
            part.T.repeat_interleave(self.group_size, 1) for part in (self.scales, self.offsets)
        )
        wide = (numbers * scales + offsets).to(dtype)
        if self.order is None:
            return wide
        return wide[:, torch.argsort(self.order)]


def takes(inputs: int, group_size: int) -> bool:
    """Whether the kernels read such a layer: whole groups, cut in steps of a power of two."""
    step = _step(group_size)
    words = group_size // 4
    is_whole = inputs % group_size == 0 and inputs % (4 * step) == 0
    return is_whole and group_size % 4 == 0 and (words % step == 0 or step % words == 0)


def _step(group_size: int) -> int:
    """16-bit words of a row that are taken at a time: 32, or 16 for groups shorter than 128."""
    return 32 if group_size % 128 == 0 else 16


def w4_linear(x: Tensor, weight: W4, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out] in x's dtype. On a GPU by the kernels, else in torch alone."""
    if x.is_cuda:
        return fast(x, weight, bias)
    return functional.linear(x, weight.dequantized(x.dtype), bias)


def fast(x: Tensor, weight: W4, bias: Tensor | None = None) -> Tensor:
    """`w4_linear` by the kernels."""
    few = x.numel() // x.shape[-1] <= FEW
    return product(x, weight, bias) if few else widened_product(x, weight, bias)


def widened_product(x: Tensor, weight: W4, bias: Tensor | None = None) -> Tensor:
    """As `fast` for many tokens; a piece of the weights is wide at a time."""
    flat = x.flatten(0, -2)
    if weight.order is not None:
        flat = flat[:, weight.order]
    outputs, inputs = weight.outputs, weight.inputs
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

    half = weight.packed.shape[1]
    grid = (-(-out.shape[0] // 16), -(-half // 64))
    widen_kernel[grid](
        weight.packed, weight.scales, weight.offsets, out, first, out.shape[0], weight.outputs,
        half, weight.group_size // 2, 16, 64, num_warps=4,
    )  # fmt: skip


def product(x: Tensor, weight: W4, bias: Tensor | None = None) -> Tensor:
    """As `fast` for few tokens."""
    from serve.engine.kernels import w4_kernels as kernels

    flat = x.flatten(0, -2).contiguous()
    tokens, outputs, words = flat.shape[0], weight.outputs, weight.inputs // 4
    step = _step(weight.group_size)
    quarters = torch.empty_like(flat)
    sums = torch.empty((tokens, words // step), dtype=torch.float32, device=x.device)
    kernels.quarter_kernel[(tokens, words // step)](
        flat, flat if weight.order is None else weight.order, quarters, sums, words, step,
        weight.order is not None, num_warps=1,
    )  # fmt: skip
    block = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    grid = (-(-outputs // 64), -(-tokens // block))
    splits = max(1, min(4, _PROGRAMS // (grid[0] * grid[1])))
    parts = torch.empty((splits, tokens, outputs), dtype=torch.float32, device=x.device)
    kernels.w4_kernel[(*grid, splits)](
        quarters, sums, weight.packed.view(torch.int16), weight.scales, weight.offsets, parts,
        tokens, outputs, words, weight.group_size // 4, 64, block, step, splits, 4, _is_packed(x),
        num_warps=4,
    )  # fmt: skip
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    kernels.join_kernel[(tokens, -(-outputs // 1024))](
        parts, out if bias is None else bias, out, tokens, outputs, splits, bias is not None, 1024,
        num_warps=4,
    )  # fmt: skip
    return out.unflatten(0, x.shape[:-1])


def _is_packed(x: Tensor) -> bool:
    """Whether numbers can be widened two in a register: float16, or bfloat16 from compute
    capability 8.0 on."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    is_half = x.dtype is torch.float16
    return is_half or torch.cuda.get_device_capability(x.device)[0] >= 8
