"""Attention over the paged cache in Triton: one new token a sequence, or many.

Pools are [blocks, block_size, kv_heads, head_dim]; `tables` int32 [sequences, columns] says which
block holds which tokens. Query heads that share a key head are rows of one product. Decoding splits
the keys of a sequence over several programs, whose parts a second kernel joins by their sums of
exponentials (as in FlashDecoding); prompts go through in tiles with a running softmax (as in
FlashAttention 2). A learned sink adds exp(sink) to the sum and no value; a window of w sees the
token itself and w - 1 before it. The torch reference is serve.engine.attention.reference. Knows
nothing of models; backend.py and gpt_oss.py call it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from serve.engine.kernels import attention_kernels as kernels
from serve.engine.kernels import experts


@dataclass(frozen=True, slots=True)
class Rule:
    """What one layer's attention is: `window` None is full, `sinks` [heads] or None."""

    scale: float
    window: int | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """Scratch for the parts of a decode: float32 [tokens * heads * splits, head_dim] and, for each
    part, its maximum and its sum, [tokens * heads * splits, 2]."""

    values: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def create(cls, tokens: int, heads: int, dim: int, splits: int, device: torch.device) -> Room:
        parts = tokens * heads * splits
        return cls(
            torch.empty((parts, dim), dtype=torch.float32, device=device),
            torch.empty((parts, 2), dtype=torch.float32, device=device),
        )


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    rule: Rule,
    out: torch.Tensor,
    splits: int,
    room: Room | None,
) -> None:
    """`query` and `out` [sequences, heads, head_dim]; `lengths` int32 [sequences], keys of each,
    the new one included. A length of 0 gives zeros. `room` may be None when `splits` is 1."""
    sequences, heads, dim = query.shape
    _, size, kv_heads, _ = keys.shape
    group = heads // kv_heads
    rows = max(16, 1 << (group - 1).bit_length())
    sinks = query if rule.sinks is None else rule.sinks
    parts = out if room is None else room.values
    sums = out if room is None else room.sums
    log2 = math.log2(math.e)
    kernels.decode_kernel[(sequences, kv_heads, splits)](
        query, keys, values, tables, lengths, sinks, out, parts, sums, tables.stride(0),
        rule.scale * log2, heads, kv_heads, group, rows, dim, size, rule.window or 0, splits,
        _decode_block(rule, dim), rule.sinks is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        kernels.join_kernel[(sequences, heads)](
            parts, sums, sinks, out, lengths, heads, dim, splits, 1 << (splits - 1).bit_length(),
            rule.sinks is not None, num_warps=2,
        )  # fmt: skip


def _decode_block(rule: Rule, dim: int) -> int:
    """Keys a step: a short window goes in one."""
    return 128 if rule.window is not None and rule.window <= 128 and dim <= 64 else 64


def prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    rule: Rule,
    out: torch.Tensor,
    longest: int,
) -> None:
    """`query` and `out` [tokens, heads, head_dim], sequences packed one after the other from
    `query_start` int32 [sequences + 1]; `longest` is the most new tokens of one sequence."""
    _, heads, dim = query.shape
    _, size, kv_heads, _ = keys.shape
    group = heads // kv_heads
    padded = 1 << (group - 1).bit_length()
    is_tight = dim > 64 and experts.shared_bytes(query) < 96 * 1024  # compute capability 7.5
    rows = max((64 if is_tight else 128) if query.element_size() == 2 else 32, padded)
    tokens = rows // padded
    sinks = query if rule.sinks is None else rule.sinks
    grid = (-(-longest // tokens), kv_heads, lengths.shape[0])
    kernels.prefill_kernel[grid](
        query, keys, values, tables, query_start, lengths, sinks, out, tables.stride(0),
        rule.scale * math.log2(math.e), heads, kv_heads, group, padded, rows, dim, size,
        rule.window or 0, 64 if query.element_size() == 2 else 32, rule.sinks is not None,
        num_warps=4 if dim <= 64 else 8, num_stages=3 if dim <= 64 else 1 if is_tight else 2,
    )  # fmt: skip
