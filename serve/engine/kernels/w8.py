"""Matrices held as 8-bit integers with one scale a row, for products with few tokens.

Half the bytes of bf16 for what a decode step reads whole: attention projections and the vocabulary.
Column c and column c + in / 2 share a 16-bit word, so that each byte plane of a tile meets one half
of the activations as they lie. Rounding is symmetric, the largest magnitude of a row = 127. gpt_oss
holds a model's matrices so when it is told to; the torch reference is `W8.dequantized`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from serve.engine.kernels.fused import Cut

FEW = 128
"""Up to so many tokens the kernel beats widening the weights for the GPU's own library."""
_ROWS_AT_ONCE = 8192
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class W8:
    """`words` int16 [rows, columns / 2]: column c in the low byte of word c, column c + columns / 2
    in the high byte; `scales` float32 [rows]."""

    words: Tensor
    scales: Tensor

    @property
    def rows(self) -> int:
        return self.words.shape[0]

    @property
    def columns(self) -> int:
        return self.words.shape[1] * 2

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns]"""
        low = (self.words << 8) >> 8
        numbers = torch.cat((low, self.words >> 8), 1).float()
        return (numbers * self.scales[:, None]).to(dtype)

    def rows_of(self, start: int, end: int) -> W8:
        return W8(self.words[start:end], self.scales[start:end])


def hold(weight: Tensor) -> W8:
    """[rows, columns] rounded, a piece of the rows at a time. Columns must be even."""
    rows, columns = weight.shape
    words = torch.empty((rows, columns // 2), dtype=torch.int16, device=weight.device)
    scales = torch.empty(rows, dtype=torch.float32, device=weight.device)
    for start in range(0, rows, _ROWS_AT_ONCE):
        piece = weight[start : start + _ROWS_AT_ONCE].float()
        scale = piece.abs().amax(1).clamp_min(1e-30) / 127
        numbers = (piece / scale[:, None]).round().to(torch.int16)
        low, high = numbers[:, : columns // 2], numbers[:, columns // 2 :]
        words[start : start + len(piece)] = (low & 0xFF) | (high << 8)
        scales[start : start + len(piece)] = scale
    return W8(words, scales)


def project(x: Tensor, weight: W8, out: Tensor, cut: Cut) -> None:
    """As fused.project: `out` float32 [splits, tokens, rows], summed over splits x times the weight
    transposed. `cut.columns` counts words."""
    from serve.engine.kernels.w8_kernels import project8_kernel

    tokens = x.shape[0]
    block = min(128, max(16, 1 << (tokens - 1).bit_length()))
    grid = (-(-weight.rows // cut.rows), -(-tokens // block), cut.splits)
    is_packed = x.is_cuda and x.dtype is torch.bfloat16
    project8_kernel[grid](
        x, weight.words, weight.scales, out, tokens, weight.rows, weight.words.shape[1], cut.rows,
        block, cut.columns, cut.splits, cut.stages, is_packed, num_warps=cut.warps,
    )  # fmt: skip


def widen(weight: W8, dtype: torch.dtype) -> Tensor:
    """`dequantized` in one pass over the weight, by a kernel on a GPU."""
    if not weight.words.is_cuda:
        return weight.dequantized(dtype)
    from serve.engine.kernels.w8_kernels import widen8_kernel

    out = torch.empty((weight.rows, weight.columns), dtype=dtype, device=weight.words.device)
    half = weight.words.shape[1]
    widen8_kernel[(weight.rows, -(-half // 1024))](
        weight.words, weight.scales, out, half, 1024, num_warps=4
    )
    return out


def hold_dense(model: Any) -> int:
    """Turn a gpt-oss model's attention projections and head into 8-bit rows, one at a time, and
    return the bytes that this freed."""
    places = [(layer.self_attn, name) for layer in model.model.layers for name in _PROJECTIONS]
    freed = 0
    for owner, name in [*places, (model, "lm_head")]:
        stock = getattr(owner, name)
        held = hold(stock.weight.detach())
        freed += stock.weight.nbytes - held.words.nbytes - held.scales.nbytes
        setattr(owner, name, Linear8Rows(held, stock.bias))
    return freed


class Linear8Rows(nn.Module):
    """Stands in for a linear layer whose weight became a W8: slow, exact to the held numbers."""

    def __init__(self, weight: W8, bias: Tensor | None) -> None:
        super().__init__()
        self.held = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, widen(self.held, x.dtype), self.bias)
