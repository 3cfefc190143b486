"""What surrounds a decoder layer's matrix products, fused: residual sum, RMSNorm, router, rotary.

    add_norm         residual += parts (+ bias); out = RMSNorm(residual), "quartered" if asked
    add_norm_route   the same, and then the router: logits, top-k, softmax, lists by expert
    route            the router alone, its logits from a matrix product (many tokens)
    rotate_and_store sum of parts (+ bias) -> rotated queries; rotated keys and values to the cache
    store            keys and values to the cache, for models that rotate their own
    project          a skinny matrix product whose parts (splits of the columns) the others sum up

Each has its torch reference in tests/test_kernels.py. Knows nothing of models; gpt_oss.py calls it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from serve.engine.kernels import fused_kernels as kernels
from serve.engine.kernels.experts import Routing


@dataclass(frozen=True, slots=True)
class Parts:
    """Summands of a result: `values` [outer, tokens * inner, columns]; row t of the result is the
    sum of rows t * inner .. (t + 1) * inner of every outer slice, and of `bias` [columns]."""

    values: torch.Tensor
    inner: int = 1
    bias: torch.Tensor | None = None


def add_norm(
    residual: torch.Tensor,
    parts: Parts | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    quartered: bool = False,
) -> None:
    """`residual` float32 [tokens, hidden], changed in place; `out` [tokens, hidden]."""
    _launch(residual, parts, weight, eps, out, quartered, None)


@dataclass(frozen=True, slots=True)
class Router:
    """`weight` [experts, hidden] and `bias` [experts] of the router, the choices a token gets, and
    where the lists go. `slots` int64 [tokens]: rows whose slot is negative are padding and routed
    nowhere. `routing.counts` must be zero."""

    weight: torch.Tensor
    bias: torch.Tensor
    top_k: int
    slots: torch.Tensor
    routing: Routing


def add_norm_route(
    residual: torch.Tensor,
    parts: Parts | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    router: Router,
) -> None:
    """`out` is quartered, as the experts' kernels want it."""
    _launch(residual, parts, weight, eps, out, True, router)


def _launch(
    residual: torch.Tensor,
    parts: Parts | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    quartered: bool,
    router: Router | None,
) -> None:
    tokens, hidden = residual.shape
    padded = 1 << (hidden - 1).bit_length()
    values = residual if parts is None else parts.values
    outer = 0 if parts is None else values.shape[0]
    inner = 1 if parts is None else parts.inner
    bias = None if parts is None else parts.bias
    route = residual if router is None else router.weight
    experts = 1 if router is None else router.weight.shape[0]
    kernels.add_norm_kernel[(tokens,)](
        residual, values, weight if bias is None else bias, weight, out,
        route, weight if router is None else router.bias,
        values if router is None else router.slots,
        values if router is None else router.routing.counts,
        values if router is None else router.routing.pairs,
        values if router is None else router.routing.weights,
        1 if router is None else router.routing.pairs.shape[1], tokens * inner * hidden, eps,
        hidden, padded, outer, inner, bias is not None, quartered, router is not None,
        experts, 1 << (experts - 1).bit_length(), 1 if router is None else router.top_k,
        min(256, padded), num_warps=8 if hidden > 1024 else 4,
    )  # fmt: skip


def route(x: torch.Tensor, router: Router, quartered_weight: torch.Tensor) -> None:
    """The router alone, for many tokens: `x` [tokens, hidden] and the weight, both quartered."""
    logits = torch.nn.functional.linear(x, quartered_weight, router.bias)
    tokens, experts = logits.shape
    routing = router.routing
    kernels.list_kernel[(tokens,)](
        logits, router.slots, routing.counts, routing.pairs, routing.weights,
        routing.pairs.shape[1], experts, 1 << (experts - 1).bit_length(), router.top_k,
        num_warps=1,
    )  # fmt: skip


def rotate_and_store(
    parts: Parts,
    turns: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """`parts` hold [queries | keys | values] of each token; `turns` float32 [positions, head_dim],
    cosines then sines; `query` [tokens, heads, head_dim]; the pools [blocks, size, kv_heads,
    head_dim] are written at `slots` int64 [tokens] (negative: nowhere)."""
    tokens, heads, dim = query.shape
    kv_heads = keys.shape[2]
    each = math.gcd(heads, kv_heads, 8)
    outer, _, columns = parts.values.shape
    kernels.rotate_kernel[(tokens, (heads + 2 * kv_heads) // each)](
        parts.values, parts.values if parts.bias is None else parts.bias, turns, positions, slots,
        query, keys, values, tokens * columns, heads, kv_heads, dim // 2, each, outer,
        parts.bias is not None, num_warps=1,
    )  # fmt: skip


def store(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor,
          values: torch.Tensor) -> None:  # fmt: skip
    """`key` and `value` [kv_heads, tokens, head_dim] (the last axis contiguous) to the pools'
    `slots` int64 [tokens]; negative: nowhere."""
    heads, tokens, dim = key.shape
    kernels.store_kernel[(tokens,)](
        key, value, slots, keys, values, key.stride(1), key.stride(0), value.stride(1),
        value.stride(0), heads, 1 << (heads - 1).bit_length(), dim, num_warps=1,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cut:
    """How `project` cuts its work: weight rows, columns a step, splits, stages, warps."""

    rows: int
    columns: int
    splits: int
    stages: int
    warps: int


def project(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, cut: Cut) -> None:
    """`out` float32 [splits, tokens, rows]: the sum over splits is x [tokens, columns] times
    `weight` [rows, columns], transposed. For few tokens; more than 16 go in blocks of up to 128."""
    tokens, columns = x.shape
    rows = weight.shape[0]
    block = min(128, max(16, 1 << (tokens - 1).bit_length()))
    grid = (-(-rows // cut.rows), -(-tokens // block), cut.splits)
    kernels.project_kernel[grid](
        x, weight, out, tokens, rows, columns, cut.rows, block, cut.columns, cut.splits, cut.stages,
        num_warps=cut.warps,
    )  # fmt: skip
