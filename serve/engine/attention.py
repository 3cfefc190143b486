"""Attention over the paged cache, reached from the models' stock forward.

`register` makes "paged" an attention implementation of transformers. The runner packs all
sequences' new tokens in one row [1, T], hands the step's backend through forward as the keyword
`paged`, and every attention layer then calls `paged_attention` with queries, keys and values
[1, heads, T, head_dim], which writes to and reads from the cache through the backend:

    begin(layout)                  once a step, before forward: what is packed, and where it goes
    write(layer, key, value)       put the new tokens' keys and values in their slots
    attend(layer, query, call)     attention of the new tokens over everything cached, [1, T, H, D]

A backend owns the pools, for each layer keys [blocks, block_size, kv_heads, head_dim] and values
the same. TorchBackend here is the plain reference for any device; attention_cpu.py reads the
cache in place. A kernel backend takes from the layout, all numpy on the host and to be copied in
one piece: `slots(group)` int64 [T] (block * block_size + offset), `query_start` int32 [B + 1],
`lengths` int32 [B] (keys of each sequence, its new ones included), `block_tables(group)` int32
[B, columns] (columns that left a window are stale). Decodes come first, `layout.decodes` of them,
one token each. A window of w sees the token itself and the w - 1 before it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """One step's packing: sequence i brings `counts[i]` new tokens from position `starts[i]`.

    `shifts`, where given, is how far each sequence's rotary positions are off its cache's: pictures
    take fewer positions than tokens on several axes. `is_exact`: the draws of some sequence are to
    be the same in any batch; `prompts`, where given, is how long the sequences' prompts are.
    """

    starts: list[int]
    counts: list[int]
    tables: list[tuple[BlockTable, ...]]
    block_size: int
    decodes: int
    total: int = field(init=False)
    shifts: Sequence[int] = ()
    is_exact: bool = False
    prompts: Sequence[int] = ()

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
    def rotary_starts(self) -> list[int]:
        if not self.shifts:
            return self.starts
        return [start + shift for start, shift in zip(self.starts, self.shifts, strict=True)]

    @cached_property
    def positions(self) -> npt.NDArray[np.int64]:
        places = [
            np.arange(start, start + count, dtype=np.int64)
            for start, count in zip(
                self.rotary_starts[self.decodes :], self.counts[self.decodes :], strict=True
            )
        ]
        return np.concatenate([np.asarray(self.rotary_starts[: self.decodes], np.int64), *places])

    def only(self, sequences: Sequence[int]) -> Layout:
        """The same step with some of its sequences, in order."""
        return Layout(
            starts=[self.starts[i] for i in sequences],
            counts=[self.counts[i] for i in sequences],
            tables=[self.tables[i] for i in sequences],
            block_size=self.block_size,
            decodes=sum(i < self.decodes for i in sequences),
            shifts=[self.shifts[i] for i in sequences] if self.shifts else (),
            is_exact=self.is_exact,
            prompts=[self.prompts[i] for i in sequences] if self.prompts else (),
        )

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
            self.group_of |= dict.fromkeys(group.layers, number)
            self._allocate([by_layer[layer] for layer in group.layers], group.blocks, dtype)
        self.windows = [group.window for group in groups]
        self._slots: list[Tensor] = []

    def _allocate(self, shapes: Sequence[LayerShape], blocks: int, dtype: torch.dtype) -> None:
        """The pools of one group's layers."""
        for shape in shapes:
            room = (blocks, self.block_size, shape.kv_heads)
            self.keys[shape.layer] = torch.zeros(
                *room, shape.key_dim, dtype=dtype, device=self.device
            )
            self.values[shape.layer] = torch.zeros(
                *room, shape.value_dim, dtype=dtype, device=self.device
            )

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
            mask = visible(start, count, first, window, self.device)
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


def visible(start: int, count: int, first: int, window: int | None, device: Any) -> Tensor:
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
