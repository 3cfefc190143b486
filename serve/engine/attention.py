"""Attention over the paged cache, reached from the models' stock forward.

`register` makes "paged" an attention implementation of transformers. The runner packs all
sequences' new tokens in one row [1, T], hands the step's backend through forward as the keyword
`paged`, and every attention layer then calls `paged_attention` with queries, keys and values
[1, heads, T, head_dim], which writes to and reads from the cache through the backend:

    begin(layout)                  once a step, before forward: what is packed, and where it goes
    write(layer, key, value)       put the new tokens' keys and values in their slots
    attend(layer, query, call)     attention of the new tokens over everything cached, [1, T, H, D]

A backend owns the pools, for each layer keys [blocks, block_size, kv_heads, head_dim] and values
the same. TorchBackend here is the plain reference for any device; CpuBackend reads the cache in
place. A kernel backend takes from the layout: `slots(group)` int64 [T] (block * block_size +
offset), `query_start` int32 [B + 1], `lengths` int32 [B] (keys of each sequence, its new ones
included), `block_tables(group)` int32 [B, columns] (columns that left a window are stale), all
numpy on the host, to be copied in one piece. Decodes come first, `layout.decodes` of them, one
token each. A window of w sees the token itself and the w - 1 before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.engine.cache import BlockTable, GroupSpec
from serve.engine.sizing import LayerShape
from serve.errors import Unsupported

NAME = "paged"


@dataclass(frozen=True, slots=True)
class Call:
    """What one attention layer asks for beyond queries, keys and values."""

    scale: float
    window: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None


@dataclass
class Layout:
    """One step's packing: sequence i brings `counts[i]` new tokens from position `starts[i]`."""

    starts: list[int]
    counts: list[int]
    tables: list[tuple[BlockTable, ...]]
    block_size: int
    decodes: int
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(self.counts)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        return np.add(self.starts, self.counts, dtype=np.int32)

    @cached_property
    def query_start(self) -> npt.NDArray[np.int32]:
        start = np.zeros(len(self.counts) + 1, np.int32)
        np.cumsum(self.counts, out=start[1:])
        return start

    @cached_property
    def positions(self) -> npt.NDArray[np.int64]:
        places = [
            np.arange(start, start + count, dtype=np.int64)
            for start, count in zip(
                self.starts[self.decodes :], self.counts[self.decodes :], strict=True
            )
        ]
        return np.concatenate([np.asarray(self.starts[: self.decodes], np.int64), *places])

    def slots(self, group: int) -> npt.NDArray[np.int64]:
        size = self.block_size
        found = np.empty(self.total, np.int64)
        at = 0
        for start, count, tables in zip(self.starts, self.counts, self.tables, strict=True):
            ids = tables[group].ids
            if count == 1:
                found[at] = int(ids[start // size]) * size + start % size
            else:
                places = np.arange(start, start + count)
                found[at : at + count] = ids[places // size].astype(np.int64) * size + places % size
            at += count
        return found

    def block_tables(self, group: int) -> npt.NDArray[np.int32]:
        columns = max(tables[group].count for tables in self.tables)
        return np.stack([tables[group].ids[:columns] for tables in self.tables])


class AttentionBackend(Protocol):
    def begin(self, layout: Layout) -> None: ...

    def write(self, layer: int, key: Tensor, value: Tensor) -> None: ...

    def attend(self, layer: int, query: Tensor, call: Call) -> Tensor: ...


def register() -> None:
    """Make "paged" known to transformers; repeating it does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The backend knows who sees whom."""


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    paged: AttentionBackend | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    if paged is None:
        raise Unsupported("This model's attention layers do not pass the cache through.")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    paged.write(layer, key, value)
    return paged.attend(layer, query, Call(scale, sliding_window, s_aux, softcap)), None


class Probe:
    """A backend that only looks: which layers attend, over which shapes and windows."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, layout: Layout) -> None: ...

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._keys[layer] = (key, value)

    def attend(self, layer: int, query: Tensor, call: Call) -> Tensor:
        key, value = self._keys.pop(layer)
        heads, dim = key.shape[1], key.shape[3]
        self.shapes[layer] = LayerShape(layer, heads, dim, value.shape[3], call.window)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


@torch.inference_mode()
def probe(model: Any, device: torch.device) -> list[LayerShape]:
    """The cache geometry of a model, from one forward of two tokens that computes no attention.
    Raises Unsupported when its attention does not come through transformers' interface."""
    register()
    model.set_attn_implementation(NAME)
    seen = Probe()
    ids = torch.zeros((1, 2), dtype=torch.long, device=device)
    positions = torch.arange(2, device=device)[None]
    model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, paged=seen)
    if not seen.shapes:
        raise Unsupported(f"{type(model).__name__} does not use transformers' attention interface.")
    return [seen.shapes[layer] for layer in sorted(seen.shapes)]


class TorchBackend:
    """Plain torch on any device: gathers a sequence's keys, then softmax(q k) v in fp32."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        groups: Sequence[GroupSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.device = device
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.group_of: dict[int, int] = {}
        by_layer = {shape.layer: shape for shape in shapes}
        for number, group in enumerate(groups):
            for layer in group.layers:
                shape = by_layer[layer]
                room = (group.blocks, block_size, shape.kv_heads)
                self.keys[layer] = torch.zeros(*room, shape.key_dim, dtype=dtype, device=device)
                self.values[layer] = torch.zeros(*room, shape.value_dim, dtype=dtype, device=device)
                self.group_of[layer] = number
        self.windows = [group.window for group in groups]
        self._slots: list[Tensor] = []

    def begin(self, layout: Layout) -> None:
        self.layout = layout
        self._slots = [
            torch.from_numpy(layout.slots(group)).to(self.device, non_blocking=True)
            for group in range(len(self.windows))
        ]
        self._read = [self._places(group) for group in range(len(self.windows))]

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        slots = self._slots[self.group_of[layer]]
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, slots, key[0].transpose(0, 1).to(keys.dtype))
        values.flatten(0, 1).index_copy_(0, slots, value[0].transpose(0, 1).to(values.dtype))

    def attend(self, layer: int, query: Tensor, call: Call) -> Tensor:
        window = self.windows[self.group_of[layer]]
        keys, values = self.keys[layer].flatten(0, 1), self.values[layer].flatten(0, 1)
        out = query.new_empty(query.shape[2], query.shape[1], values.shape[-1])
        at = 0
        for (first, places), start, count in zip(
            self._read[self.group_of[layer]], self.layout.starts, self.layout.counts, strict=True
        ):
            mask = _visible(start, count, first, window, self.device)
            q = query[0, :, at : at + count]
            out[at : at + count] = reference(q, keys[places], values[places], mask, call)
            at += count
        return out[None]

    def _places(self, group: int) -> list[tuple[int, Tensor]]:
        """For each sequence the first position that can be seen, and the slots from there on."""
        window, size, found = self.windows[group], self.block_size, []
        for start, count, tables in zip(
            self.layout.starts, self.layout.counts, self.layout.tables, strict=True
        ):
            first = 0 if window is None else max(0, start - window + 1)
            at = np.arange(first, start + count)
            slots = tables[group].ids[at // size].astype(np.int64) * size + at % size
            found.append((first, torch.from_numpy(slots).to(self.device)))
        return found


def _visible(start: int, count: int, first: int, window: int | None, device: Any) -> Tensor:
    """bool [count, keys]: which keys from position `first` on each new token sees."""
    queries = torch.arange(start, start + count, device=device)[:, None]
    keys = torch.arange(first, start + count, device=device)[None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def reference(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, call: Call) -> Tensor:
    """One sequence's attention in fp32: query [H, t, D], keys and values [L, kv heads, D], mask
    [t, L]; returns [t, H, Dv]. Sinks take part in the softmax's sum and carry no value."""
    groups = query.shape[0] // keys.shape[1]
    keys = keys.permute(1, 0, 2).float().repeat_interleave(groups, 0)
    values = values.permute(1, 0, 2).float().repeat_interleave(groups, 0)
    scores = query.float() @ keys.transpose(1, 2) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return (weights @ values).transpose(0, 1).to(query.dtype)


_flash: Callable[..., tuple[Tensor, Tensor]] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring cached tokens of one sequence: `length` slots from `slot` on."""

    slot: int
    length: int


class CpuBackend(TorchBackend):
    """Reads keys and values where they lie: a sequence's neighbouring blocks are one view, several
    runs are joined by their log-sum-exp (as in FlashAttention's split-KV), sinks likewise. Query
    heads that share a key head are rows of one product, so nothing is repeated or copied."""

    def begin(self, layout: Layout) -> None:
        self.layout = layout
        self._slots = [torch.from_numpy(layout.slots(g)) for g in range(len(self.windows))]
        self._past = [
            [
                self._pieces(tables[g], start, count, self.windows[g])
                for start, count, tables in zip(
                    layout.starts, layout.counts, layout.tables, strict=True
                )
            ]
            for g in range(len(self.windows))
        ]
        self._read = []

    def attend(self, layer: int, query: Tensor, call: Call) -> Tensor:
        if call.softcap is not None or query.shape[-1] != self.values[layer].shape[-1]:
            if not self._read:
                self._read = [self._places(group) for group in range(len(self.windows))]
            return super().attend(layer, query, call)
        group = self.group_of[layer]
        window, layout = self.windows[group], self.layout
        heads, kv_heads = query.shape[1], self.keys[layer].shape[2]
        out = query.new_empty(query.shape[2], heads, query.shape[3])
        at = 0
        for i, count in enumerate(layout.counts):
            pieces = self._past[group][i]
            if count == 1:
                q = query[0, :, at].view(1, kv_heads, heads // kv_heads, -1)
                found = self._decode(layer, q, pieces, call).view(1, heads, -1)
            else:
                q = query[:, :, at : at + count].unflatten(1, (kv_heads, -1))[0]
                found = self._prompt(layer, q, pieces, layout.starts[i], window, call)
            out[at : at + count] = found
            at += count
        return out[None]

    def _pieces(
        self, table: BlockTable, start: int, count: int, window: int | None
    ) -> list[_Piece]:
        """The cached tokens [first seen, start + count) as views; decodes see no further back than
        the window, a chunk of several tokens its first token's window."""
        size, end = self.block_size, start + count
        first = 0 if window is None else max(0, start - window + 1)
        pieces = []
        for column, block, blocks in table.runs:
            low = max(column * size, first)
            high = min((column + blocks) * size, end)
            if low < high:
                pieces.append(_Piece((block - column) * size + low, high - low))
        return pieces

    def _view(self, pool: Tensor, piece: _Piece) -> Tensor:
        """[1, kv heads, length, dim] of the pool, nothing copied."""
        heads, dim = pool.shape[2], pool.shape[3]
        token = heads * dim
        shape = (1, heads, piece.length, dim)
        return pool.as_strided(shape, (0, dim, token, 1), piece.slot * token)

    def _decode(self, layer: int, q: Tensor, pieces: list[_Piece], call: Call) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        parts = [
            _flash(q, self._view(keys, p), self._view(values, p), 0.0, False, scale=call.scale)
            for p in pieces
        ]
        out, total = parts[0] if len(parts) == 1 else _join(parts)
        if call.sinks is None:
            return out
        return _dampen(out, total, call.sinks.view(1, q.shape[1], q.shape[2]))

    def _prompt(
        self,
        layer: int,
        q: Tensor,
        pieces: list[_Piece],
        start: int,
        window: int | None,
        call: Call,
    ) -> Tensor:
        """A chunk of one prompt, q [kv heads, group, t, D] -> [t, H, D]."""
        keys = torch.cat([self._view(self.keys[layer], p) for p in pieces], 2)[0]
        values = torch.cat([self._view(self.values[layer], p) for p in pieces], 2)[0]
        count, length, share = q.shape[2], keys.shape[1], q.shape[1]
        keys = keys[:, None].expand(-1, share, -1, -1)
        values = values[:, None].expand(-1, share, -1, -1)
        if window is None or start + count <= window:
            past = length - count
            parts = [_flash(q, keys[:, :, past:], values[:, :, past:], 0.0, True, scale=call.scale)]
            if past:
                early = keys[:, :, :past], values[:, :, :past]
                parts.append(_flash(q, *early, 0.0, False, scale=call.scale))
        else:
            seen = _visible(start, count, start + count - length, window, None)
            mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
            parts = [
                _flash(q, keys, values, 0.0, False, attn_mask=mask[None, None], scale=call.scale)
            ]
        out, total = parts[0] if len(parts) == 1 else _join(parts)
        if call.sinks is not None:
            out = _dampen(out, total, call.sinks.view(q.shape[0], share, 1))
        return out.flatten(0, 1).transpose(0, 1)


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over several pieces from each piece's result and log-sum-exp."""
    sums = torch.stack([part[1] for part in parts])
    total = sums.logsumexp(0)
    weights = (sums - total).exp()
    joined = sum(part[0] * weight[..., None] for part, weight in zip(parts, weights, strict=True))
    return joined.to(parts[0][0].dtype), total


def _dampen(out: Tensor, total: Tensor, sinks: Tensor) -> Tensor:
    """A sink adds exp(sink) to the softmax's sum and no value."""
    return out * torch.sigmoid(total - sinks.float())[..., None].to(out.dtype)
