"""Attention on a CPU, reading keys and values where they lie.

A sequence's neighbouring blocks are one view of the cache; several runs of blocks are attended one
by one and joined by their log-sum-exp (as in FlashAttention's split-KV), and sinks enter the same
way. Query heads that share a key head are rows of one product. So nothing is gathered, repeated or
masked by everybody's keys, and a step's Python grows with sequences, not with tokens. Speaks
attention.py's AttentionBackend; `attend_packed` is for modules.py, which have q, k, v in one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.engine.attention import Call, Layout, TorchBackend, visible
from serve.engine.cache import BlockTable
from serve.engine.sizing import LayerShape

_flash: Callable[..., tuple[Tensor, Tensor]] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
)
_Run = tuple[Sequence[Tensor], Sequence[Tensor]]  # keys and values, a view for each layer
Places = npt.NDArray[np.int64]
_Part = tuple[Tensor, Tensor]  # attention over some keys [1, H, t, D], and its log-sum-exp


@dataclass(frozen=True, slots=True)
class Runs:
    """Where a step's new tokens go and what each of them sees: token t is written to slot
    `slots[t]` and sees the `lengths[r]` slots from `starts[r]` on, for r from `first[t]` to
    `first[t + 1]`."""

    slots: Places
    first: Places
    starts: Places
    lengths: Places


class CpuBackend(TorchBackend):
    """Keys and values of a group's layers lie in one tensor [layers, slots, 2, kv heads, dim], so
    that one view a sequence serves all its layers. Layers of unlike shapes use the plain way."""

    def _allocate(self, shapes: Sequence[LayerShape], blocks: int, dtype: torch.dtype) -> None:
        if not hasattr(self, "_stores"):
            self._stores: list[Tensor | None] = []
            self._depth: dict[int, int] = {}
        first = shapes[0]
        alike = all(
            (s.kv_heads, s.key_dim, s.value_dim) == (first.kv_heads, first.key_dim, first.key_dim)
            for s in shapes
        )
        if not alike:
            self._stores.append(None)
            super()._allocate(shapes, blocks, dtype)
            return
        slots = blocks * self.block_size
        store = torch.empty(len(shapes), slots, 2, first.kv_heads, first.key_dim, dtype=dtype)
        self._stores.append(store)
        for depth, shape in enumerate(shapes):
            self._depth[shape.layer] = depth
            keys, values = store[depth].unflatten(0, (blocks, self.block_size)).unbind(2)
            self.keys[shape.layer], self.values[shape.layer] = keys, values

    def begin(self, layout: Layout) -> None:
        self.layout = layout
        self._slots = [torch.from_numpy(layout.slots(g)) for g in range(len(self.windows))]
        self._pieces: list[list[list[_Run]]] = []
        self._read = []

    def attend(self, layer: int, query: Tensor, call: Call) -> Tensor:
        if call.softcap is not None or self._stores[self.group_of[layer]] is None:
            if not self._read:
                self._read = [self._places(group) for group in range(len(self.windows))]
            return super().attend(layer, query, call)
        return self._attend(layer, query[0].transpose(0, 1), call)[None]

    def attend_packed(self, layer: int, packed: Tensor, heads: int, call: Call) -> Tensor:
        """Write and attend in one: `packed` [T, heads + 2 kv heads, dim] is queries, keys, values
        of each token; returns [T, heads, dim]."""
        group = self.group_of[layer]
        store = self._stores[group]
        assert store is not None, "this layer's pools are of the plain kind"
        fresh = packed[:, heads:].unflatten(1, (2, -1))
        store[self._depth[layer]].index_copy_(0, self._slots[group], fresh)
        return self._attend(layer, packed[:, :heads], call)

    def stores(self) -> dict[int, tuple[int, npt.NDArray[np.float32]]]:
        """For each layer its group and its cache as an array [slots, 2, kv heads, dim]."""
        found = {}
        for layer, depth in self._depth.items():
            group = self.group_of[layer]
            store = self._stores[group]
            assert store is not None, "this layer's pools are of the plain kind"
            found[layer] = (group, store[depth].numpy())
        return found

    def runs(self) -> list[Runs]:
        """For each group where the step's tokens are written and what each of them sees."""
        layout, found = self.layout, []
        for group, window in enumerate(self.windows):
            pieces = [
                self._runs(layout.tables[i][group], place, 1, window)
                for i, start in enumerate(layout.starts)
                for place in range(start, start + layout.counts[i])
            ]
            flat = np.array([run for runs in pieces for run in runs], np.int64).reshape(-1, 2).T
            first = np.zeros(len(pieces) + 1, np.int64)
            np.cumsum([len(runs) for runs in pieces], out=first[1:])
            slots = self._slots[group].numpy()
            found.append(Runs(slots, first, *np.ascontiguousarray(flat)))
        return found

    # -- inside ------------------------------------------------------------------------------------

    def _group_pieces(self, group: int) -> list[list[_Run]]:
        """For each sequence its runs of cached tokens, oldest first: views of keys and of values
        [1, kv heads, length, dim], one for every layer of the group."""
        store = self._stores[group]
        if store is None:
            return []
        layers, slots, _, heads, dim = store.shape
        token = 2 * heads * dim
        strides = (slots * token, 0, dim, token, 1)
        layout, window = self.layout, self.windows[group]
        found: list[list[_Run]] = []
        for start, count, tables in zip(layout.starts, layout.counts, layout.tables, strict=True):
            pieces: list[_Run] = []
            for slot, length in self._runs(tables[group], start, count, window):
                shape = (layers, 1, heads, length, dim)
                keys = store.as_strided(shape, strides, slot * token)
                values = store.as_strided(shape, strides, slot * token + heads * dim)
                pieces.append((keys.unbind(0), values.unbind(0)))
            found.append(pieces)
        return found

    def _runs(
        self, table: BlockTable, start: int, count: int, window: int | None
    ) -> list[tuple[int, int]]:
        """(first slot, length) of the cached tokens [first seen, start + count): a decode sees no
        further back than the window, a chunk of tokens as far as its first one does."""
        size, end = self.block_size, start + count
        first = 0 if window is None else max(0, start - window + 1)
        runs = []
        for column, block, blocks in table.runs:
            low = max(column * size, first)
            high = min((column + blocks) * size, end)
            if low < high:
                runs.append(((block - column) * size + low, high - low))
        return runs

    def _attend(self, layer: int, query: Tensor, call: Call) -> Tensor:
        """query [T, H, D] -> [T, H, D]"""
        group, layout = self.group_of[layer], self.layout
        if not self._pieces:
            self._pieces = [self._group_pieces(g) for g in range(len(self.windows))]
        depth, pieces = self._depth[layer], self._pieces[group]
        kv_heads = self.keys[layer].shape[2]
        decodes = layout.decodes
        parts = []
        if decodes:
            rows = query[:decodes].unflatten(1, (kv_heads, -1)).unsqueeze(1).unbind(0)
            for q, runs in zip(rows, pieces[:decodes], strict=True):
                parts.append(_decode(q, runs, depth, call))
            if call.sinks is not None:
                parts = _dampen_all(parts, call.sinks)
            done = torch.cat([part[0] for part in parts]).view(decodes, query.shape[1], -1)
            if decodes == len(layout.counts):
                return done
            outs = [done]
        else:
            outs = []
        at = decodes
        for i in range(decodes, len(layout.counts)):
            count, start = layout.counts[i], layout.starts[i]
            q = query[at : at + count].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
            outs.append(_prompt(q, pieces[i], depth, start, self.windows[group], call))
            at += count
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _decode(q: Tensor, runs: Sequence[_Run], depth: int, call: Call) -> _Part:
    """One new token, q [1, kv heads, group, D]: every key of the runs is seen."""
    if len(runs) == 1:
        keys, values = runs[0]
        return _flash(q, keys[depth], values[depth], 0.0, False, scale=call.scale)
    return _join(
        [
            _flash(q, keys[depth], values[depth], 0.0, False, scale=call.scale)
            for keys, values in runs
        ]
    )


def _prompt(
    q: Tensor,
    runs: Sequence[_Run],
    depth: int,
    start: int,
    window: int | None,
    call: Call,
) -> Tensor:
    """A chunk of one prompt, q [kv heads, group, t, D] -> [t, H, D]: earlier keys are all seen, the
    chunk's own causally; a mask only where the window cuts inside the chunk."""
    kv_heads, share, count, _ = q.shape
    keys = torch.cat([keys[depth] for keys, _ in runs], 2)[0][:, None].expand(-1, share, -1, -1)
    values = torch.cat([values[depth] for _, values in runs], 2)[0][:, None].expand(
        -1, share, -1, -1
    )
    past = keys.shape[2] - count
    if window is None or start + count <= window:
        parts = [_flash(q, keys[:, :, past:], values[:, :, past:], 0.0, True, scale=call.scale)]
        if past:
            early = keys[:, :, :past], values[:, :, :past]
            parts.append(_flash(q, *early, 0.0, False, scale=call.scale))
    else:
        seen = visible(start, count, start - past, window, None)
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
        parts = [_flash(q, keys, values, 0.0, False, attn_mask=mask[None, None], scale=call.scale)]
    out, total = parts[0] if len(parts) == 1 else _join(parts)
    if call.sinks is not None:
        out = out * _share_of_keys(total, call.sinks.view(kv_heads, share, 1)).to(out.dtype)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _join(parts: Sequence[_Part]) -> _Part:
    """Attention over several pieces from each piece's result and log-sum-exp."""
    sums = torch.stack([part[1] for part in parts])
    total = sums.logsumexp(0)
    weights = (sums - total).exp().unsqueeze(-1)
    joined = (torch.stack([part[0] for part in parts]) * weights).sum(0)
    return joined.to(parts[0][0].dtype), total


def _share_of_keys(total: Tensor, sinks: Tensor) -> Tensor:
    """A sink adds exp(sink) to the softmax's sum and no value."""
    return torch.sigmoid(total - sinks.float()).unsqueeze(-1)


def _dampen_all(parts: Sequence[_Part], sinks: Tensor) -> list[_Part]:
    out = torch.cat([part[0] for part in parts])
    total = torch.cat([part[1] for part in parts])
    return [(out * _share_of_keys(total, sinks.view(1, *total.shape[1:])).to(out.dtype), total)]
