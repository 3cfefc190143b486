"""gpt-oss as few kernels: the stock model's weights, run step by step without its modules.

FusedGptOss computes what GptOssForCausalLM.forward computes over packed sequences and a paged
cache: about nine launches a layer. The stock model stays as it is and is the reference; its query,
key and value weights become views of one joined matrix. Expert weights stay MXFP4 as loaded
(Mxfp4Experts). Every launch depends on the batch's sizes only, so a step of single tokens can be
captured in a CUDA graph. Knows no requests and no cache accounting; the CUDA runner calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from serve.engine.kernels import attention, fused, w8
from serve.engine.kernels.experts import (
    Mxfp4Experts,
    Routing,
    down_product,
    down_tile,
    gate_up_product,
    gate_up_tile,
    quarter,
)
from serve.engine.kernels.w8 import W8, Linear8Rows

FEW = 32
"""Up to so many tokens our own matrix products read weights faster than cuBLAS."""

Matrix = Tensor | W8
"""[rows, columns] as stored, or rounded to 8 bits."""


@dataclass(frozen=True, slots=True)
class Cuts:
    """How a product with one of the model's matrices is cut (bench/gpu/README.md): of the matrix
    as stored, and in 8 bits, where columns come two a word."""

    stored: fused.Cut
    rounded: fused.Cut


QKV = Cuts(fused.Cut(64, 128, 2, 4, 4), fused.Cut(64, 32, 4, 5, 4))
OUTPUT = Cuts(fused.Cut(64, 64, 4, 5, 4), fused.Cut(64, 64, 4, 4, 4))
HEAD = Cuts(fused.Cut(64, 128, 1, 4, 4), fused.Cut(128, 64, 1, 3, 8))


@dataclass(frozen=True, slots=True)
class Batch:
    """One step on the device: sequences packed one after the other, `decodes` of one token first.

    `ids` and `positions` int64 [tokens]; `slots` int64 [tokens] and `tables` int32 [sequences,
    columns] for each group of layers; `lengths` int32 [sequences], keys of each, the new included;
    `query_start` int32 [sequences + 1]; `longest`: the most new tokens of a sequence. A row whose
    slot is negative is padding: nothing is stored or routed for it.
    """

    ids: Tensor
    positions: Tensor
    slots: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    lengths: Tensor
    query_start: Tensor
    decodes: int
    longest: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights, and where its cache is."""

    norm: Tensor
    qkv: Matrix
    qkv_bias: Tensor
    output: Matrix
    output_bias: Tensor
    rule: attention.Rule
    group: int
    keys: Tensor
    values: Tensor
    second_norm: Tensor
    router: Tensor
    quartered_router: Tensor
    router_bias: Tensor
    experts: Mxfp4Experts


def splits_for(sequences: int) -> int:
    """Parts of each sequence's keys in a decode; of the batch only, so that a graph holds it."""
    return 1 << min(5, max(1, 64 // sequences).bit_length() - 1)


class FusedGptOss:
    """`keys` and `values`: each layer's pools [blocks, block_size, kv_heads, head_dim];
    `group_of`: which of the batch's slots and tables a layer uses; `context_length`: positions."""

    def __init__(
        self,
        model: Any,
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        group_of: Mapping[int, int],
        context_length: int,
    ) -> None:
        config, inner = model.config, model.model
        self.heads = config.num_attention_heads
        self.dim = config.head_dim
        self.top_k = config.num_experts_per_tok
        self.experts = config.num_local_experts
        self.eps = config.rms_norm_eps
        self.embedding = inner.embed_tokens.weight
        self.head = _matrix(model.lm_head)
        self.norm = inner.norm.weight
        self.dtype = self.embedding.dtype
        self.device = self.embedding.device
        positions = torch.arange(context_length + 1, device=self.device)[None]
        turns = inner.rotary_emb(torch.zeros((), device=self.device), positions)
        self.turns = torch.cat(turns, -1)[0].float().contiguous()
        self.layers = [
            _layer(layer, keys[i], values[i], group_of[i]) for i, layer in enumerate(inner.layers)
        ]

    @torch.inference_mode()
    def forward(self, batch: Batch, rows: Tensor | None) -> Tensor:
        """Logits [rows, vocabulary] of the named rows, of every row when None."""
        tokens = batch.ids.shape[0]
        residual = functional.embedding(batch.ids, self.embedding).float()
        x = torch.empty((tokens, residual.shape[1]), dtype=self.dtype, device=self.device)
        counts = torch.zeros((len(self.layers), self.experts), dtype=torch.int32, device=x.device)
        pairs = torch.empty((self.experts, tokens), dtype=torch.int32, device=x.device)
        weights = torch.empty((tokens, self.top_k), dtype=torch.float32, device=x.device)
        parts: fused.Parts | None = None
        for layer, count in zip(self.layers, counts, strict=True):
            fused.add_norm(residual, parts, layer.norm, self.eps, x)
            parts = self._attention(layer, x, batch)
            routing = Routing(count, pairs, weights)
            self._normalize_and_route(layer, residual, parts, x, batch, routing)
            parts = self._experts(layer, x, routing)
        fused.add_norm(residual, parts, self.norm, self.eps, x)
        return self._logits(x if rows is None else x[rows])

    def _attention(self, layer: Layer, x: Tensor, batch: Batch) -> fused.Parts:
        tokens = x.shape[0]
        query = torch.empty((tokens, self.heads, self.dim), dtype=self.dtype, device=x.device)
        fused.rotate_and_store(
            self._project(x, layer.qkv, layer.qkv_bias, QKV),
            self.turns, batch.positions, batch.slots[layer.group], query, layer.keys, layer.values,
        )  # fmt: skip
        out = torch.empty_like(query)
        table, n = batch.tables[layer.group], batch.decodes
        if n:
            splits = 1 if layer.rule.window is not None else splits_for(n)
            room = None
            if splits > 1:
                room = attention.Room.create(n, self.heads, self.dim, splits, x.device)
            attention.decode(
                query[:n], layer.keys, layer.values, table, batch.lengths[:n], layer.rule, out[:n],
                splits, room,
            )  # fmt: skip
        if n < tokens:
            attention.prefill(
                query, layer.keys, layer.values, table[n:], batch.query_start[n:],
                batch.lengths[n:], layer.rule, out, batch.longest,
            )  # fmt: skip
        return self._project(out.flatten(1), layer.output, layer.output_bias, OUTPUT)

    def _normalize_and_route(
        self,
        layer: Layer,
        residual: Tensor,
        parts: fused.Parts,
        x: Tensor,
        batch: Batch,
        routing: Routing,
    ) -> None:
        router = fused.Router(
            layer.router, layer.router_bias, self.top_k, batch.slots[layer.group], routing
        )
        if x.shape[0] <= 128:
            fused.add_norm_route(residual, parts, layer.second_norm, self.eps, x, router)
        else:
            fused.add_norm(residual, parts, layer.second_norm, self.eps, x, quartered=True)
            fused.route(x, router, layer.quartered_router)

    def _experts(self, layer: Layer, x: Tensor, routing: Routing) -> fused.Parts:
        held, tokens = layer.experts, x.shape[0]
        made = x.new_empty((tokens * self.top_k, held.gate_up.rows // 2))
        gate_up_product(
            x, held.gate_up, routing, made, held.alpha, held.limit, gate_up_tile(tokens, x)
        )
        tile = down_tile(tokens, x)
        dtype = torch.float32 if tokens <= 1024 else self.dtype
        out = torch.empty(
            (tile.splits, tokens * self.top_k, x.shape[1]), dtype=dtype, device=x.device
        )
        down_product(made, held.down, routing, out, tile)
        return fused.Parts(out, self.top_k)

    def _project(self, x: Tensor, weight: Matrix, bias: Tensor, cuts: Cuts) -> fused.Parts:
        if not is_few(x, weight):
            return fused.Parts(functional.linear(x, _wide(weight, x), bias)[None])
        return fused.Parts(_product(x, weight, cuts), 1, bias)

    def _logits(self, x: Tensor) -> Tensor:
        if not x.shape[0] or not is_few(x, self.head):
            return functional.linear(x, _wide(self.head, x))
        return _product(x, self.head, HEAD)[0]


def is_few(x: Tensor, weight: Matrix) -> bool:
    """Whether our own product is the fastest for so many tokens."""
    return x.shape[0] <= (w8.FEW if isinstance(weight, W8) else FEW)


def _product(x: Tensor, weight: Matrix, cuts: Cuts) -> Tensor:
    """float32 [splits, tokens, rows]"""

    def room(rows: int, cut: fused.Cut) -> Tensor:
        shape = (cut.splits, x.shape[0], rows)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    if isinstance(weight, W8):
        out = room(weight.rows, cuts.rounded)
        w8.project(x, weight, out, cuts.rounded)
    else:
        out = room(weight.shape[0], cuts.stored)
        fused.project(x, weight, out, cuts.stored)
    return out


def _wide(weight: Matrix, x: Tensor) -> Tensor:
    return w8.widen(weight, x.dtype) if isinstance(weight, W8) else weight


def _layer(layer: Any, keys: Tensor, values: Tensor, group: int) -> Layer:
    """Joins queries, keys and values; the stock layer's own weights become views of the joined."""
    heads = layer.self_attn
    three = [heads.q_proj, heads.k_proj, heads.v_proj]
    router = layer.mlp.router
    return Layer(
        norm=layer.input_layernorm.weight,
        qkv=_join8(three) if isinstance(three[0], Linear8Rows) else _join(three, "weight"),
        qkv_bias=_join(three, "bias"),
        output=_matrix(heads.o_proj),
        output_bias=heads.o_proj.bias,
        rule=attention.Rule(heads.scaling, heads.sliding_window, heads.sinks),
        group=group,
        keys=keys,
        values=values,
        second_norm=layer.post_attention_layernorm.weight,
        router=router.weight,
        quartered_router=quarter(router.weight),
        router_bias=router.bias,
        experts=layer.mlp.experts,
    )


def _matrix(linear: Any) -> Matrix:
    held: Matrix = linear.held if isinstance(linear, Linear8Rows) else linear.weight
    return held


def _join8(modules: list[Linear8Rows]) -> W8:
    """As `_join`, of matrices in 8 bits."""
    held = [module.held for module in modules]
    joined = W8(torch.cat([w.words for w in held]), torch.cat([w.scales for w in held]))
    start = 0
    for module in modules:
        module.held = joined.rows_of(start, start + module.held.rows)
        start += module.held.rows
    return joined


def _join(modules: list[Any], name: str) -> Tensor:
    """One tensor of all; each module keeps a view of its share."""
    joined = torch.cat([getattr(module, name).data for module in modules])
    start = 0
    for module in modules:
        own = getattr(module, name)
        own.data = joined[start : start + own.shape[0]]
        start += own.shape[0]
    return joined
