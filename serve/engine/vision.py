"""Pictures in the engine's step: features computed once, given to the model where its ids ask.

`Vision` makes forward's arguments for a step (runner.StepInputs). A prompt's pictures are encoded
by the model's own `get_image_features` when its first chunk that holds one is computed, and kept by
the pixels' key in a small cache, apart for each tenant. The model merges them itself: the step's
rows, and no others, are handed over as its `mm_encoder_outputs`, so a prompt may be cut anywhere
and stand beside text. Models with several position axes get theirs from their `get_rope_index`.
Knows no decoding of files; made by seeing.py, called on the engine's thread.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.engine.runner import token_inputs
from serve.engine.scheduler import Chunk
from serve.engine.sequence import Request

FEATURE_BYTES = 256 * 2**20


class Shown(Protocol):
    """What formats/images.py puts into Prompt.inputs["vision"]."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def keys(self) -> tuple[bytes, ...]: ...


@dataclass(frozen=True, slots=True)
class Features:
    """Rows for picture tokens, [tokens, hidden], and what is added in the first layers (DeepStack),
    each [tokens, hidden]."""

    rows: Tensor
    deep: tuple[Tensor, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.rows, *self.deep))

    def __getitem__(self, part: slice) -> Features:
        return Features(self.rows[part], tuple(deep[part] for deep in self.deep))


def joined(parts: Sequence[Features]) -> Features:
    deep = zip(*(part.deep for part in parts), strict=True)
    return Features(torch.cat([part.rows for part in parts]), tuple(map(torch.cat, deep)))


class FeatureCache:
    """The latest pictures' features by (tenant, key), within a number of bytes."""

    def __init__(self, most_bytes: int = FEATURE_BYTES) -> None:
        self._kept: OrderedDict[tuple[str, bytes], Features] = OrderedDict()
        self._bytes = 0
        self._most_bytes = most_bytes
        self.hits = 0
        self.misses = 0

    def get(self, tenant: str, key: bytes) -> Features | None:
        found = self._kept.get((tenant, key))
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end((tenant, key))
        return found

    def put(self, tenant: str, key: bytes, features: Features) -> None:
        if features.bytes > self._most_bytes:
            return
        self._kept[tenant, key] = features
        self._bytes += features.bytes
        while self._bytes > self._most_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].bytes


@dataclass(slots=True)
class _Plan:
    """One prompt: where its picture tokens are, its positions on several axes and how far what
    follows is off (None: one axis), and the features while its prompt is computed."""

    places: npt.NDArray[np.int64]
    axes: Tensor | None
    offset: int
    features: Features | None = None


class Vision:
    def __init__(self, model: Any, device: torch.device, cache: FeatureCache | None = None) -> None:
        self._core = model.model
        self._device = device
        self._embed = model.get_input_embeddings()
        self.cache = cache or FeatureCache()
        self._token = image_token(model.config)
        self._has_axes = hasattr(self._core, "get_rope_index")
        self._taken = set(inspect.signature(self._core.get_image_features).parameters)
        self._plans: WeakKeyDictionary[Shown, _Plan] = WeakKeyDictionary()
        self._output: Any = None
        self._is_whole = False

    def __call__(
        self, model: Any, chunks: Sequence[Chunk], ids: Tensor, positions: Tensor
    ) -> dict[str, Any]:
        plans = [self._plan(chunk.sequence.request) for chunk in chunks]
        made = token_inputs(model, chunks, ids, positions)
        if any(plan is not None and plan.axes is not None for plan in plans):
            made["position_ids"] = self._positions(chunks, plans, positions)
        rows = self._rows(chunks, plans)
        if rows is not None:
            made["mm_encoder_outputs"] = {"image": self._as_encoded(rows)}
        return made

    def shifts(self, chunks: Sequence[Chunk]) -> Sequence[int] | None:
        """runner.Shifts: a step that only goes on after its pictures is one of plain ids."""
        found = []
        for chunk in chunks:
            plan = self._plan(chunk.sequence.request)
            is_past = chunk.start >= chunk.sequence.request.prompt_length
            if plan is not None and not is_past:
                low, high = np.searchsorted(plan.places, (chunk.start, chunk.end))
                if plan.axes is not None or low < high:
                    return None
            found.append(plan.offset if plan is not None and is_past else 0)
        return found if any(found) else ()

    # -- what a prompt needs -----------------------------------------------------------------------

    def _plan(self, request: Request) -> _Plan | None:
        inputs = request.generation.prompt.inputs
        if inputs is None:
            return None
        shown: Shown = inputs["vision"]
        found = self._plans.get(shown)
        if found is None:
            found = self._plans[shown] = self._make_plan(request, shown)
        return found

    def _make_plan(self, request: Request, shown: Shown) -> _Plan:
        ids = np.asarray(request.generation.prompt.ids)
        places = np.flatnonzero(ids == self._token)
        if not self._has_axes:
            return _Plan(places, None, 0)
        row = torch.from_numpy(ids)[None]
        axes, offset = self._core.get_rope_index(
            row, (row == self._token).int(), image_grid_thw=shown.tensors["image_grid_thw"]
        )
        return _Plan(places, axes[:, 0].to(self._device), int(offset))

    def _positions(
        self, chunks: Sequence[Chunk], plans: Sequence[_Plan | None], positions: Tensor
    ) -> Tensor:
        """[axes, 1, T]: each prompt with pictures by its own axes, all else the same on each."""
        count = next(len(p.axes) for p in plans if p is not None and p.axes is not None)
        axes = positions.expand(count, *positions.shape).clone()
        at = 0
        for chunk, plan in zip(chunks, plans, strict=True):
            if plan is not None and plan.axes is not None:
                length = plan.axes.shape[1]
                inside = max(0, min(chunk.end, length) - chunk.start)
                axes[:, 0, at : at + inside] = plan.axes[:, chunk.start : chunk.start + inside]
                axes[:, 0, at + inside : at + chunk.count] += plan.offset
            at += chunk.count
        return axes

    # -- rows for this step's picture tokens -------------------------------------------------------

    def _rows(self, chunks: Sequence[Chunk], plans: Sequence[_Plan | None]) -> Features | None:
        """In the order of the packed row. A picture's token that was drawn, or stands in a raw
        prompt, is a word like any other and gets its own embedding."""
        parts: list[Features | int] = []
        for chunk, plan in zip(chunks, plans, strict=True):
            sequence = chunk.sequence
            start = chunk.start
            if plan is not None:
                low, high = np.searchsorted(plan.places, (chunk.start, chunk.end))
                if low < high:
                    parts.append(self._features(plan, sequence.request)[slice(low, high)])
                if chunk.end >= sequence.request.prompt_length:
                    plan.features = None
                start = max(start, sequence.request.prompt_length)
            plain = sequence.ids[start : chunk.end].count(self._token)
            if plain:
                parts.append(plain)
        if not parts:
            return None
        seen = [part for part in parts if isinstance(part, Features)]
        deep = len(seen[0].deep) if seen else 0
        if not seen:
            return None  # the ids alone say it
        return joined([self._plain(p, deep) if isinstance(p, int) else p for p in parts])

    def _plain(self, count: int, deep: int) -> Features:
        row = self._embed(torch.tensor([self._token], device=self._device)).expand(count, -1)
        return Features(row, (torch.zeros_like(row),) * deep)

    def _as_encoded(self, features: Features) -> Any:
        """The rows in the form in which this model's encoder would have answered."""
        rows = features.rows if self._is_whole else (features.rows,)
        made = self._output(pooler_output=rows)
        if features.deep:
            made.deepstack_features = [(deep,) for deep in features.deep]
        return made

    def _features(self, plan: _Plan, request: Request) -> Features:
        if plan.features is None:
            shown: Shown = request.generation.prompt.inputs["vision"]  # type: ignore[index]
            apart = separate(shown.tensors, shown.keys)
            found = [self._encoded(request.tenant, key, part) for key, part in apart]
            plan.features = joined(found)
            assert len(plan.features.rows) == len(plan.places), "features and ids do not match"
        return plan.features

    def _encoded(self, tenant: str, key: bytes, tensors: Mapping[str, Tensor]) -> Features:
        found = self.cache.get(tenant, key)
        if found is None:
            found = self._encode(tensors)
            self.cache.put(tenant, key, found)
        return found

    def _encode(self, tensors: Mapping[str, Tensor]) -> Features:
        given = {n: t.to(self._device) for n, t in tensors.items() if n in self._taken}
        given["pixel_values"] = given["pixel_values"].to(self._embed.weight.dtype)
        answered = self._core.get_image_features(**given, return_dict=True)
        pooled = answered.pooler_output
        self._output, self._is_whole = type(answered), isinstance(pooled, Tensor)
        rows = pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))
        deep = getattr(answered, "deepstack_features", None) or ()
        kind = self._embed.weight.dtype
        return Features(
            rows.reshape(-1, rows.shape[-1]).to(kind),
            tuple(torch.cat(list(layer)).to(kind) for layer in deep),
        )


def image_token(config: Any) -> int:
    found = getattr(config, "image_token_id", None)
    return int(config.image_token_index if found is None else found)


def separate(
    tensors: Mapping[str, Tensor], keys: Sequence[bytes]
) -> list[tuple[bytes, Mapping[str, Tensor]]]:
    """Each picture's own part of a processor's tensors with its key; all in one, with a common
    key, when they cannot be told apart.

    Either patches of all pictures lie end to end, as many as `image_grid_thw` [pictures, 3] says,
    or the first axis counts the pictures; what has another length belongs to them all.
    """
    count = len(keys)
    pixels, grid = tensors["pixel_values"], tensors.get("image_grid_thw")
    if grid is not None:
        parts = torch.split(pixels, grid.prod(-1).tolist())
        return [
            (keys[i], {"pixel_values": part, "image_grid_thw": grid[i : i + 1]})
            for i, part in enumerate(parts)
        ]
    if count == 1 or len(pixels) != count:
        return [(b"".join(keys), tensors)]
    return [
        (key, {name: t[i : i + 1] if len(t) == count else t for name, t in tensors.items()})
        for i, key in enumerate(keys)
    ]
