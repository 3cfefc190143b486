"""Linear layers with 8-bit weights for the CPU: a quarter of float32's memory and traffic.

Each output row has one scale (symmetric, largest magnitude = 127); inputs and sums go through
torch's int8 product in bfloat16. Made from an unquantized model after it is loaded
(QUANT_TYPE=int8). Embeddings and the head stay as they are. Called by loader.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Linear8(nn.Module):
    """Stands in for a bias-or-not nn.Linear; x of any shape and float type in, the same out."""

    weight8: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = stock.in_features, stock.out_features
        weight = stock.weight.detach().float()
        scales = weight.abs().amax(1).clamp_min(1e-12) / 127
        self.register_buffer("weight8", (weight / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if stock.bias is None else stock.bias.detach())

    def widened(self) -> Tensor:
        return self.weight8.float() * self.scales.float()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).bfloat16().contiguous()
        made = torch._weight_int8pack_mm(flat, self.weight8, self.scales.bfloat16()).to(x.dtype)
        if self.bias is not None:
            made = made + self.bias.to(x.dtype)
        return made.reshape(*x.shape[:-1], self.out_features)


def to_int8(model: Any) -> Any:
    """Replace every linear layer but the head, one at a time, and widen the rest to float32."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, Linear8(module))
    return model.float()
