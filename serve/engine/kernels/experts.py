"""Mixture-of-experts layers over MXFP4 weights: with Triton, and in torch alone.

Both read the checkpoint's own bytes. `experts` is the fast path: activations in and out of its two
kernels are "quartered" (column 4q + j sits at j * K / 4 + q), which is what lets the kernels widen
four columns at once; tokens come grouped by expert through `Routing`. `reference` is the same layer
in torch; it widens only the experts that were hit, one at a time, and is the path for CPUs and for
GPUs without Triton. Knows nothing of models; gpt_oss.py and the loader build on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from serve.engine.kernels import mxfp4

FAST_SCALE_LIMIT = 128
"""The packed widening folds 2**126 into the scale; scale bytes beyond this leave bf16's range."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One projection of all experts, [experts, rows, columns] in MXFP4.

    `words` int16 [experts, rows, columns / 4], the checkpoint's blocks seen as 16-bit words;
    `scales` uint8 [experts, rows, padded groups] (rows padded to 16 bytes for the copy engine);
    `bias` [experts, rows]; `is_fast`: every scale is small enough for the packed widening.
    """

    words: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor
    is_fast: bool

    @property
    def rows(self) -> int:
        return self.words.shape[1]

    @property
    def columns(self) -> int:
        return self.words.shape[2] * 4

    def dequantized(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] of one expert."""
        groups = self.columns // mxfp4.GROUP
        blocks = self.words[expert].view(torch.uint8).unflatten(-1, (groups, 16))
        return mxfp4.dequantize(blocks, self.scales[expert, :, :groups], dtype)


def expert_weights(blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> ExpertWeights:
    """From the checkpoint's tensors; the blocks are not copied."""
    words = blocks.contiguous().flatten(-2).view(torch.int16)
    groups = scales.shape[-1]
    padded = torch.zeros(
        (*scales.shape[:-1], -(-groups // 16) * 16), dtype=torch.uint8, device=scales.device
    )
    padded[..., :groups] = scales
    is_fast = scales.device.type == "meta" or bool(scales.max() <= FAST_SCALE_LIMIT)
    return ExpertWeights(words, padded, bias.contiguous(), is_fast)


def quarter(x: torch.Tensor) -> torch.Tensor:
    """Columns 4q + j moved to j * K / 4 + q."""
    return x.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2).contiguous()


def unquarter(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2).contiguous()


@dataclass(frozen=True, slots=True)
class Routing:
    """Which (token, choice) pairs each expert serves.

    `counts` int32 [experts] and `pairs` int32 [experts, capacity]: the first counts[e] entries of
    row e are token * top_k + choice, in any order; `weights` float32 [tokens, top_k].
    """

    counts: torch.Tensor
    pairs: torch.Tensor
    weights: torch.Tensor


def route(indices: torch.Tensor, weights: torch.Tensor, experts: int) -> Routing:
    """Routing of int [tokens, top_k] `indices` by torch alone."""
    tokens, top_k = indices.shape
    flat = indices.flatten().long()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    starts = counts.cumsum(0) - counts
    place = torch.arange(tokens * top_k, device=flat.device) - starts[flat[order]]
    pairs = torch.zeros((experts, tokens), dtype=torch.int32, device=flat.device)
    pairs[flat[order], place] = order.int()
    return Routing(counts.int(), pairs, weights.float())


def reference(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> torch.Tensor:
    """The layer in torch, [tokens, hidden] like `x`: gate (even rows) and up (odd rows), clamped at
    `limit`, (up + 1) * gate * sigmoid(alpha * gate), down, summed by routing weight.

    `indices` int and `weights` [tokens, top_k]. Sums in the order of the experts, in x's dtype.
    """
    out = torch.zeros_like(x)
    for expert in indices.unique().tolist():
        token, choice = torch.where(indices == expert)
        made = x[token] @ gate_up.dequantized(expert, x.dtype).T + gate_up.bias[expert].to(x.dtype)
        gate = made[:, 0::2].clamp(max=limit)
        up = made[:, 1::2].clamp(min=-limit, max=limit)
        made = (up + 1) * (gate * torch.sigmoid(gate * alpha))
        made = made @ down.dequantized(expert, x.dtype).T + down.bias[expert].to(x.dtype)
        out.index_add_(0, token, (made * weights[token, choice, None]).to(x.dtype))
    return out


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel cuts its work: weight rows, tokens, 16-bit words a step, stages, warps, and in
    how many parts the columns are split."""

    rows: int
    tokens: int
    words: int
    stages: int
    warps: int
    splits: int = 1


def gate_up_tile(tokens: int, x: torch.Tensor) -> Tile:
    """The cut for so many tokens in all; measured (bench/gpu/README.md). Wide tiles need the shared
    memory of an H100 or A100; smaller cards and float32 take what fits everywhere."""
    if tokens <= 64:
        return _few(x, 16)
    if tokens <= 256:
        return _few(x, 32)
    return _many(x)


def down_tile(tokens: int, x: torch.Tensor) -> Tile:
    if tokens <= 4:
        return replace(_few(x, 16), splits=2)
    return gate_up_tile(tokens, x)


def _few(x: torch.Tensor, tokens: int) -> Tile:
    if x.element_size() > 2 or shared_bytes(x) < 96 * 1024:
        return Tile(32, 16, 32, 2, 4)
    return Tile(64, tokens, 64, 3, 4)


def _many(x: torch.Tensor) -> Tile:
    shared = shared_bytes(x)
    if x.element_size() > 2 or shared < 96 * 1024:
        return Tile(32, 32, 32, 2, 4)
    if shared < 160 * 1024:
        return Tile(64, 64, 32, 3, 4)
    return Tile(128, 128, 64 if shared > 200 * 1024 else 32, 3, 8)


def shared_bytes(x: torch.Tensor) -> int:
    """Shared memory a block may use on x's device; the interpreter (CPU) has any."""
    if not x.is_cuda:
        return 1 << 20
    properties = torch.cuda.get_device_properties(x.device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def gate_up_product(
    x: torch.Tensor,
    weights: ExpertWeights,
    routing: Routing,
    out: torch.Tensor,
    alpha: float,
    limit: float,
    tile: Tile,
) -> None:
    """`x` [tokens, hidden] and `out` [tokens * top_k, intermediate], both quartered."""
    from serve.engine.kernels.experts_kernels import gate_up_kernel

    tokens, top_k = routing.weights.shape
    experts = routing.counts.shape[0]
    grid = (-(-weights.rows // tile.rows), _blocks(tokens, top_k, experts, tile.tokens))
    gate_up_kernel[grid](
        x, weights.words, weights.scales, weights.bias, out, routing.counts, routing.pairs,
        routing.pairs.shape[1], alpha, limit, weights.rows, weights.columns // 4,
        weights.scales.shape[2], experts, _power_of_two(experts), top_k, tile.rows, tile.tokens,
        tile.words, tile.stages, _is_packed(x, weights), num_warps=tile.warps,
    )  # fmt: skip


def down_product(
    x: torch.Tensor, weights: ExpertWeights, routing: Routing, out: torch.Tensor, tile: Tile
) -> None:
    """`x` [tokens * top_k, intermediate] quartered, `out` [splits, tokens * top_k, hidden], whose
    sum over splits and a token's choices is the layer's result."""
    from serve.engine.kernels.experts_kernels import down_kernel

    tokens, top_k = routing.weights.shape
    experts = routing.counts.shape[0]
    grid = (
        -(-weights.rows // tile.rows),
        _blocks(tokens, top_k, experts, tile.tokens),
        tile.splits,
    )
    down_kernel[grid](
        x, weights.words, weights.scales, weights.bias, out, routing.counts, routing.pairs,
        routing.weights, routing.pairs.shape[1], tokens * top_k, weights.rows,
        weights.columns // 4, weights.scales.shape[2], experts, _power_of_two(experts),
        tile.splits, tile.rows, tile.tokens, tile.words, tile.stages, _is_packed(x, weights),
        num_warps=tile.warps,
    )  # fmt: skip


def experts(
    x: torch.Tensor,
    routing: Routing,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> torch.Tensor:
    """The layer by the kernels: `x` [tokens, hidden] as it is, the result in x's dtype."""
    tokens, top_k = routing.weights.shape
    made = x.new_empty((tokens * top_k, gate_up.rows // 2))
    gate_up_product(quarter(x), gate_up, routing, made, alpha, limit, gate_up_tile(tokens, x))
    tile = down_tile(tokens, x)
    parts = x.new_empty((tile.splits, tokens, top_k, down.rows), dtype=torch.float32)
    down_product(made, down, routing, parts, tile)
    return parts.sum((0, 2)).to(x.dtype)


def _blocks(tokens: int, top_k: int, experts: int, block: int) -> int:
    """The most blocks of tokens that any routing can need."""
    pairs = tokens * top_k
    return min(pairs, experts + pairs // block)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _is_packed(x: torch.Tensor, weights: ExpertWeights) -> bool:
    """Whether the widening in packed bf16 registers can be used (compute capability 8.0 and up)."""
    return (
        weights.is_fast
        and x.dtype is torch.bfloat16
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device)[0] >= 8
    )


class Mxfp4Experts(nn.Module):
    """Stands in for GptOssExperts, with its weights in MXFP4. On a GPU with Triton by the kernels,
    else by the torch reference, which widens one hit expert at a time."""

    def __init__(
        self, gate_up: ExpertWeights, down: ExpertWeights, alpha: float, limit: float
    ) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.alpha, self.limit = alpha, limit
        for name, held in (("gate_up_proj", gate_up), ("down_proj", down)):
            self.register_buffer(f"{name}_words", held.words)
            self.register_buffer(f"{name}_padded_scales", held.scales)
            self.register_buffer(f"{name}_bias", held.bias)

    def forward(
        self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states` [tokens, hidden], `indices` and `weights` [tokens, top_k]."""
        if hidden_states.is_cuda:
            routing = route(indices, weights, self.gate_up.words.shape[0])
            return experts(hidden_states, routing, self.gate_up, self.down, self.alpha, self.limit)
        return reference(
            hidden_states, indices, weights, self.gate_up, self.down, self.alpha, self.limit
        )
