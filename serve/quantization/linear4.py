"""A linear layer whose weights stay in 4 bits, whatever checkpoint they come from.

AWQ and GPTQ files pack the same thing in different orders: codes q in 0..15, and for each group of
inputs a scale s and a zero point z, weight = (q - z) * s. Both are turned once, at load, into one
form: codes [out, in], and s and (8 - z) * s per group, which is what torch's int4 products take
in bfloat16 (on a CPU their float32 form is fifty times slower). On a GPU our own kernels read the
same codes; where neither can run, `widened` and a plain product do.
Checked against the formats' own arithmetic in tests. Called by packed.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from serve.engine.kernels import w4

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of an AWQ word holds a column
TORCH_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Packing:
    """How a checkpoint packs: `group` inputs share a scale (the whole row when it is -1)."""

    method: str
    group: int
    bits: int = 4
    zero_offset: int = 0

    def groups(self, inputs: int) -> int:
        return 1 if self.group <= 0 else -(-inputs // self.group)


class Linear4(nn.Module):
    """Stands in for nn.Linear(inputs, outputs). Holds the checkpoint's tensors under their names
    until `settle` turns them into the one form and lets them go."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool, packing: Packing) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self._packing = packing
        groups, per_word = packing.groups(inputs), 32 // packing.bits
        if packing.method == "awq":
            words: tuple[int, ...] = (inputs, outputs // per_word)
        else:
            words = (inputs // per_word, outputs)
            self.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))
        self.register_buffer("qweight", torch.zeros(words, dtype=torch.int32))
        zeros = torch.zeros((groups, outputs // per_word), dtype=torch.int32)
        self.register_buffer("qzeros", zeros)
        self.register_buffer("scales", torch.zeros((groups, outputs)))
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)
        self._order: Tensor | None = None
        self._codes: Tensor | None = None
        self._scales_and_zeros: Tensor
        self._packed: Tensor | None = None
        self._kernel: w4.W4 | None = None
        self._group = packing.group if packing.group > 0 else inputs

    def settle(self) -> None:
        """Turn what was loaded into the form that products use."""
        codes, zeros, group_of = self._unpacked()
        if group_of is not None:
            self._sort_inputs(codes, group_of)
            codes = codes[:, group_of.argsort(stable=True)]
        scales = self.scales.float().T  # [out, groups]
        offset = (8.0 - zeros) * scales
        self._scales_and_zeros = torch.stack([scales, offset], -1).transpose(0, 1).contiguous()
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            if hasattr(self, name):
                delattr(self, name)
        self._keep(codes)

    def _unpacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """codes int32 [out, in], zero points [out, groups], and which group an input is of, when
        they are not simply in order."""
        packing = self._packing
        if packing.method == "awq":
            codes = _nibbles(self.qweight, AWQ_ORDER).T
            return codes, _nibbles(self.qzeros, AWQ_ORDER).T.float(), None
        straight = tuple(range(8))
        codes = _nibbles(self.qweight.T.contiguous(), straight)
        zeros = (_nibbles(self.qzeros, straight) + packing.zero_offset) & 15
        group_of = self.g_idx.long()
        in_order = torch.arange(self.in_features, device=group_of.device) // self._group
        is_sorted = bool(torch.equal(group_of, in_order))
        return codes, zeros.T.float(), None if is_sorted else group_of

    def _sort_inputs(self, codes: Tensor, group_of: Tensor) -> None:
        """Act-order files spread a group's inputs; ours are put side by side, and x with them."""
        counts = torch.bincount(group_of, minlength=self._packing.groups(self.in_features))
        full = torch.full_like(counts, self._group)
        full[-1] = self.in_features - self._group * (len(full) - 1)
        if not torch.equal(counts, full):
            raise ValueError("its g_idx puts groups of unequal size together")
        self._order = group_of.argsort(stable=True)

    def _keep(self, codes: Tensor) -> None:
        if runs_kernels(codes.device) and w4.takes(self.in_features, self._group):
            scales, zeros = self._scales_and_zeros.unbind(-1)
            offsets = zeros - 8.0 * scales
            held = (_pairs(codes), scales.contiguous(), offsets.contiguous())
            self._kernel = w4.W4(*held, self._group, self._order)
            return
        fits = self._group in TORCH_GROUPS and self.in_features % self._group == 0
        if fits and codes.device.type == "cpu" and self.out_features % 16 == 0:
            self._packed = torch._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)
            self._scales_and_zeros = self._scales_and_zeros.bfloat16()
            return
        self._codes = _pairs(codes)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in] as the checkpoint means them, inputs in this layer's own order."""
        if self._kernel is not None:
            return replace(self._kernel, order=None).dequantized(dtype)
        if self._codes is None:
            one = torch.eye(self.in_features, device=self._scales_and_zeros.device, dtype=dtype)
            return self._product(one).T.to(dtype)
        codes = torch.stack([self._codes & 15, self._codes >> 4], -1).flatten(-2).float()
        scales, zeros = self._scales_and_zeros.float().unbind(-1)
        scales, zeros = (
            per.T.repeat_interleave(self._group, 1)[:, : self.in_features]
            for per in (scales, zeros)
        )
        return ((codes - 8.0) * scales + zeros).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self._kernel is not None:
            return w4.w4_linear(x, self._kernel, self.bias)
        flat = x.reshape(-1, x.shape[-1])
        if self._order is not None:
            flat = flat[:, self._order]
        made = self._product(flat).to(x.dtype)
        if self.bias is not None:
            made = made + self.bias.to(x.dtype)
        return made.reshape(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return functional.linear(x, self.widened(x.dtype))
        return torch._weight_int4pack_mm_for_cpu(
            x.bfloat16().contiguous(), self._packed, self._group, self._scales_and_zeros
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._packing}"


def _nibbles(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """int32 [rows, n] -> the 4-bit numbers [rows, 8 n], nibble `order[i]` of a word being its i-th
    number."""
    shifts = torch.tensor([4 * place for place in order], device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(-2)


def _pairs(codes: Tensor) -> Tensor:
    """uint8 [out, in / 2]: two neighbouring inputs, the first in the low bits."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).contiguous()


def runs_kernels(device: torch.device) -> bool:
    """Whether our kernels run there: a GPU, and Triton, which comes with torch for CUDA."""
    return device.type == "cuda" and find_spec("triton") is not None


def as_linear4(linear: nn.Linear, packing: Packing) -> Any:
    """An empty Linear4 of a linear layer's shape."""
    return Linear4(linear.in_features, linear.out_features, linear.bias is not None, packing)
