"""Faster equivalents for modules of stock models on a CPU, put in their place at load.

Two things are gained. Linear layers keep their weights a second time, packed as fp16 for FBGEMM,
whose product (fp32 in, fp32 sums, fp32 out) beats the stock one two to four times for the few rows
of a decode step and rounds nothing that came from bf16 or from 4 bits. And decoder layers of the
Llama family run as one module: queries, keys and values by one product, gate and up by one, norms
and rotary embedding by a few operations instead of dozens.

The stock layer stays inside as the reference and runs whenever it is called without the CPU cache;
its weights are views of the joined ones. Called once by runner.py; knows modules, no requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from serve.engine.attention import Call
from serve.engine.attention_cpu import CpuBackend

log = logging.getLogger(__name__)

LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
_MIN_WEIGHTS = 1 << 16  # smaller matrices are in the processor's cache either way
_FP16_MOST = 60_000.0
_SAMPLED = 14  # matrices, two layers' worth: more than the processor's cache holds
_ROWS = (1, 8, 32, 128)


class Projection(nn.Module):
    """y = x W' + b for x [rows, in]; several stock layers of the same input may be joined in it.
    Up to `packed_rows` rows go through the packed weights."""

    def __init__(self, parts: Sequence[nn.Linear], packed_rows: int) -> None:
        super().__init__()
        # Not parameters: the stock layers' own are views of them, and are counted once.
        self.weight = parts[0].weight.data
        self.bias = _joined_bias(parts)
        if len(parts) > 1:
            self.weight = torch.cat([part.weight.data for part in parts])
            pieces = self.weight.split([part.out_features for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                part.weight.data = piece
        self.packed = pack(self.weight, self.bias) if packed_rows else None
        self.packed_rows = packed_rows

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None or x.shape[0] > self.packed_rows:
            return functional.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return out.to(x.dtype)


def pack(weight: Tensor, bias: Tensor | None = None) -> Any | None:
    """FBGEMM's fp16 form of a matrix [out, in]; None when fp16 cannot hold it."""
    if float(weight.detach().abs().max()) > _FP16_MOST:
        return None
    wide = None if bias is None else bias.float()
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), wide)


def _joined_bias(parts: Sequence[nn.Linear]) -> Tensor | None:
    """The parts' biases one after the other, zeros for a part without one; None if none has one."""
    if all(part.bias is None for part in parts):
        return None
    return torch.cat(
        [p.weight.new_zeros(p.out_features) if p.bias is None else p.bias.data for p in parts]
    )


class PackedLinear(nn.Module):
    """A stock nn.Linear's stand-in for inputs of any shape; answers in the input's dtype."""

    def __init__(self, stock: nn.Linear, packed_rows: int) -> None:
        super().__init__()
        self.stock = stock
        self.projection = Projection([stock], packed_rows)

    @property
    def weight(self) -> Tensor:
        return self.stock.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class Rotation:
    """A step's rotary factors in the shape the joined layers use, made once a step for all."""

    def __init__(self) -> None:
        self._cos: Tensor | None = None
        self._made: tuple[Tensor, Tensor] | None = None

    def of(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos [T, 1, D], and sin with its first half negated: x cos + roll(x, D / 2) sin turns
        halves as transformers' rotate_half does."""
        if self._made is None or self._cos is not cos:
            half = sin.shape[-1] // 2
            signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)[:, None]
            self._cos, self._made = cos, (cos[0][:, None], signed)
        return self._made


class JoinedLayer(nn.Module):
    """A decoder layer of the Llama family: norm, attention, norm, gated MLP, with residuals."""

    def __init__(self, stock: Any, rotation: Rotation, packed_rows: int) -> None:
        super().__init__()
        attention, mlp = stock.self_attn, stock.mlp
        self.stock = stock
        self.rotation = rotation
        self.layer = int(attention.layer_idx)
        self.dim = int(attention.head_dim)
        self.heads = attention.q_proj.out_features // self.dim
        self.kv_heads = attention.k_proj.out_features // self.dim
        self.call = Call(float(attention.scaling))
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], packed_rows)
        self.out = Projection([attention.o_proj], packed_rows)
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj], packed_rows)
        self.down = Projection([mlp.down_proj], packed_rows)
        self.hidden = mlp.gate_proj.out_features
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        backend = kwargs.get("paged")
        if not isinstance(backend, CpuBackend):
            out: Tensor = self.stock(hidden_states, *args, **kwargs)
            return out
        rows = hidden_states[0]
        rows = rows + self._attend(rows, kwargs["position_embeddings"], backend)
        joined = self.gate_up(_norm(rows, self.stock.post_attention_layernorm))
        gated = functional.silu(joined[:, : self.hidden]).mul_(joined[:, self.hidden :])
        return (rows + self.down(gated))[None]

    def _attend(self, rows: Tensor, position: tuple[Tensor, Tensor], backend: CpuBackend) -> Tensor:
        packed = self.qkv(_norm(rows, self.stock.input_layernorm))
        packed = packed.view(rows.shape[0], -1, self.dim)
        turning = packed[:, : self.heads + self.kv_heads]
        if self.q_norm is not None:
            queries, keys = turning[:, : self.heads], turning[:, self.heads :]
            queries.copy_(_norm(queries, self.q_norm))
            keys.copy_(_norm(keys, self.k_norm))
        cos, sin = self.rotation.of(*position)
        turned = turning.roll(self.dim // 2, -1)
        turning.mul_(cos).addcmul_(turned, sin)
        seen = backend.attend_packed(self.layer, packed, self.heads, self.call)
        return self.out(seen.flatten(1))


class FastNorm(nn.Module):
    """RMSNorm as one operation."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight = stock.weight
        self.variance_epsilon = stock.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return _norm(x, self)


def _norm(x: Tensor, norm: Any) -> Tensor:
    """RMSNorm by one reduction and two products; torch's own takes eight passes on a CPU."""
    if x.dtype != torch.float32:
        return functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    width = x.shape[-1]
    scale = length.square_().div_(width).add_(norm.variance_epsilon).rsqrt_()
    return (x * scale).mul_(norm.weight)


# -- putting them in place -------------------------------------------------------------------------


@torch.inference_mode()
def install(model: Any, *, packs: bool) -> int:
    """Replace what has a faster equivalent, in place. Returns up to how many rows packed weights
    are used: 0 when `packs` is off or they are no faster on this machine."""
    rows = measure_packed_rows(model) if packs else 0
    rotation = Rotation()
    for name, module in _outside_joined(model):
        if type(module).__name__ in LAYERS and _is_plain(module):
            _replace(model, name, JoinedLayer(module, rotation, rows))
    if rows:
        for name, module in _lone_linears(model):
            _replace(model, name, PackedLinear(module, rows))
    return rows


def _is_plain(layer: Any) -> bool:
    """Whether a layer is built exactly as JoinedLayer computes it."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    gated = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        all(type(linear) is nn.Linear for linear in (*linears, *gated))
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and not layer.training
    )


def _lone_linears(model: Any) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in _outside_joined(model)
        if type(module) is nn.Linear and module.weight.numel() >= _MIN_WEIGHTS
    ]


def _outside_joined(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules that are no part of one replaced already."""
    done = tuple(
        name + "."
        for name, module in model.named_modules()
        if isinstance(module, JoinedLayer | PackedLinear)
    )
    return [(name, m) for name, m in model.named_modules() if not name.startswith(done)]


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def measure_packed_rows(model: Any) -> int:
    """Up to how many rows packed products of this model's matrices beat the stock ones, on one
    thread; 0 where the machine has no such kernel."""
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    weights = [m.weight.detach() for m in linears if m.weight.numel() >= _MIN_WEIGHTS][:_SAMPLED]
    if not weights or "fbgemm" not in torch.backends.quantized.supported_engines:
        return 0
    packed = [pack(weight) for weight in weights]
    pairs = [(w, p) for w, p in zip(weights, packed, strict=True) if p is not None]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = 0
    for rows in _ROWS:
        inputs = [torch.randn(rows, weight.shape[1]) for weight, _ in pairs]
        plain = _seconds(
            functional.linear,
            [(x.to(w.dtype), w) for x, (w, _) in zip(inputs, pairs, strict=True)],
        )
        quick = _seconds(
            torch.ops.quantized.linear_dynamic_fp16,
            [(x, p) for x, (_, p) in zip(inputs, pairs, strict=True)],
        )
        best = rows if quick < plain else best
    torch.set_num_threads(threads)
    log.info("Packed weights are used for up to %d rows", best)
    return best


def _seconds(product: Callable[..., object], calls: Sequence[tuple[Any, ...]]) -> float:
    """Processor time of all calls, the best of a few goes: other work on the machine only adds."""
    goes = []
    for _ in range(3):
        began = time.thread_time()
        for arguments in calls:
            product(*arguments)
        goes.append(time.thread_time() - began)
    return min(goes)
