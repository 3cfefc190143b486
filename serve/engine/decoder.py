"""A CPU's decodes and short prompts without torch's hundreds of small operations.

Their rows go through all layers in one compiled function (step_jit.py), which every core runs at
the same time on pieces of the same products. Long prompts go through the stock model; both share
the cache. A product's inputs are rounded to 8 bits, which enlarges the last bit's differences
between two ways to compute a prompt until draws differ; so in a step with a seeded request they are
kept as precise as float32. Stands in for the model's forward (runner.py puts it there); knows no
requests.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serve.engine import blocks, step_jit
from serve.engine.attention import Layout
from serve.engine.attention_cpu import CpuBackend, Runs
from serve.engine.blocks import BLOCK, TILE, Floats
from serve.engine.modules import JoinedLayer
from serve.engine.products_jit import instructions
from serve.engine.step_jit import Shape, Step, Weights

log = logging.getLogger(__name__)

MODELS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
_TERMS, _EXACT_TERMS = 1, 3  # roundings of a product's inputs
_MIN_WEIGHTS = 10_000_000  # building takes seconds; a smaller model is fast either way
_SHORT = 256  # tokens of a prompt, with what of it is in the cache
_MARGIN = 256  # tokens that rows may grow by before new arrays are made
_MIN_BYTES = 1 << 14  # of a layer's smallest product, for each thread


def fits(model: Any) -> bool:
    """Whether `model` is one whose decode steps this module can compute on this processor."""
    if type(model).__name__ not in MODELS or instructions() is None:
        return False
    layers = list(model.model.layers)
    linears = [p for layer in layers if isinstance(layer, JoinedLayer) for p in _projections(layer)]
    return (
        all(isinstance(layer, JoinedLayer) for layer in layers)
        and model.dtype == torch.float32
        and all(linear.weight.shape[1] % BLOCK == 0 for linear in linears)
        and all(float(linear.weight.abs().max()) < blocks.LARGEST for linear in linears)
        and sum(linear.weight.numel() for linear in linears) >= _MIN_WEIGHTS
    )


def _projections(layer: JoinedLayer) -> tuple[Any, ...]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


class Decoder:
    """`model` after modules.py has joined its layers. Its forward afterwards: `forward`."""

    def __init__(self, model: Any) -> None:
        began = time.monotonic()
        layers = list(model.model.layers)
        first, kind = layers[0], instructions()
        assert kind is not None, "fits() was not asked"
        self._shape = Shape(
            heads=first.heads,
            kv_heads=first.kv_heads,
            dim=first.dim,
            width=first.out.weight.shape[0],
            hidden=first.hidden,
            has_head_norms=first.q_norm is not None,
        )
        smallest = min(linear.weight.numel() for linear in _projections(first))
        self._threads = max(1, min(cores(), smallest // 2 // _MIN_BYTES))
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="decode")
        compiled = step_jit.compile_step(self._shape, kind)
        self._packed: list[blocks.Packed] = []
        self._weights = _weights_without_matrices(model)
        self._last = self._room(0, 0, 1, 1)
        compiling = self._pool.submit(compiled, self._weights, self._last, 0)
        for weight in _matrices(model):
            self._packed.append(blocks.packed(blocks.blocks(weight)))
        self._weights = self._weights._replace(matrices=_table(self._packed, _matrices(model)))
        self._numbers = [layer.layer for layer in layers]
        self._stores: np.ndarray[Any, Any] | None = None
        compiling.result()
        self._step = compiled
        self._model = model
        self._stock = model.forward
        self._embedding = model.get_input_embeddings().weight.detach().numpy()
        self._vocabulary = int(model.lm_head.weight.shape[0])
        seconds = time.monotonic() - began
        log.info("Decode steps: %s, %d threads; made in %.1f s", kind, self._threads, seconds)

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward's keywords, of those the runner uses. Decodes come first in a step."""
        backend = kwargs.get("paged")
        if not isinstance(backend, CpuBackend) or "input_ids" not in kwargs or args:
            return self._stock(*args, **kwargs)
        layout = backend.layout
        sequences = _computable(layout)
        if not sequences:
            return self._stock(**kwargs)
        count = sum(layout.counts[:sequences])
        ids, positions = kwargs["input_ids"][0], kwargs["position_ids"][0]
        keep: Tensor = kwargs["logits_to_keep"]
        terms = _EXACT_TERMS if layout.is_exact else _TERMS
        if self._stores is None:
            self._stores = _stores(backend, self._numbers)
        runs = backend.runs(sequences)
        step = self._begun(ids[:count], positions[:count], keep[keep < count], runs, terms)
        logits = self._computed(step._replace(stores=self._stores))
        if count < ids.shape[0]:
            backend.begin(layout.after(sequences))
            kwargs |= {
                "input_ids": ids[None, count:],
                "position_ids": positions[None, count:],
                "logits_to_keep": keep[keep >= count] - count,
            }
            logits = torch.cat([logits, self._stock(**kwargs).logits[0]])
        return SimpleNamespace(logits=logits[None])

    def _begun(
        self, ids: Tensor, positions: Tensor, drawn: Tensor, runs: Sequence[Runs], terms: int
    ) -> Step:
        hidden = self._embedding[ids.numpy()]
        turn = self._model.model.rotary_emb(torch.from_numpy(hidden)[None], positions[None])
        cos, sin = (part[0].numpy() for part in turn)
        longest = max(_longest(run) for run in runs)
        step = self._room_again(len(hidden), drawn.shape[0], terms, longest)
        before = np.cumsum([0, *(len(run.starts) for run in runs[:-1])])
        return step._replace(
            hidden=hidden,
            cos=cos,
            sin=sin,
            drawn=drawn.numpy(),
            slots=np.stack([run.slots for run in runs]),
            first=np.stack([run.first + low for run, low in zip(runs, before, strict=True)]),
            starts=np.concatenate([run.starts for run in runs]),
            lengths=np.concatenate([run.lengths for run in runs]),
        )

    def _computed(self, step: Step) -> Tensor:
        """[rows that draw, vocabulary]"""
        for thread in range(1, self._threads):
            self._pool.submit(self._step, self._weights, step, thread)
        self._step(self._weights, step, 0)
        return torch.from_numpy(step.logits[:, : self._vocabulary])

    def _room_again(self, rows: int, drawn: int, terms: int, longest: int) -> Step:
        """The last step's arrays, where they fit: new ones come from the system page by page. Its
        counters are not taken over: a thread that is late may still look at them."""
        last = self._last
        held = (len(last.every), len(last.logits), last.terms)
        if held != (rows, drawn, terms) or last.scores.shape[2] < longest:
            self._last = last = self._room(rows, drawn, terms, longest + _MARGIN)
        return last._replace(counters=self._counters())

    def _counters(self) -> np.ndarray[Any, Any]:
        phases = len(self._packed) // 4 * step_jit.PHASES + step_jit.LAST_PHASES
        return np.zeros(phases * step_jit.COUNTER, np.uint8)

    def _room(self, rows: int, drawn: int, terms: int, longest: int) -> Step:
        """A step's arrays, those that it reads empty."""
        shape = self._shape
        attended = shape.heads * shape.dim
        widest = max(shape.width, attended, shape.hidden)
        lines = terms * max(rows, drawn)
        packed, seen = _floats(rows, shape.joined), _floats(rows, attended)
        vocabulary = self._packed[-1].data.shape[0] * TILE if self._packed else 0
        places = np.empty((1, 0), np.int64)
        return Step(
            every=np.arange(rows),
            hidden=_floats(rows, shape.width),
            cos=_floats(rows, shape.dim),
            sin=_floats(rows, shape.dim),
            drawn=places[0],
            terms=terms,
            threads=self._threads,
            stores=np.empty((0, 3), np.int64),
            slots=places,
            first=places,
            starts=places[0],
            lengths=places[0],
            packed=packed,
            split=packed.reshape(rows, shape.heads + 2 * shape.kv_heads, shape.dim),
            seen=seen,
            seen_heads=seen.reshape(rows, shape.heads, shape.dim),
            gated=_floats(rows, 2 * shape.hidden),
            logits=_floats(drawn, vocabulary),
            inputs=np.empty(lines * widest, np.int8),
            scales=_floats(lines * widest // BLOCK * 2),
            cells=_floats(self._threads, BLOCK),
            tiles=_floats(self._threads, step_jit.ROWS, TILE),
            scores=_floats(self._threads, shape.heads, longest),
            counters=self._counters(),
        )


def _computable(layout: Layout) -> int:
    """How many of a step's sequences, from the first on, are decodes or short prompts. In a long
    one each token would read many keys alone, which the stock model's attention reads together."""
    count = layout.decodes
    while count < len(layout.counts) and layout.starts[count] + layout.counts[count] <= _SHORT:
        count += 1
    return count


def cores() -> int:
    """How many the process may use: those it sees, or fewer where a container's share is less."""
    seen = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(seen, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return seen


def _floats(*shape: int) -> Floats:
    return np.empty(shape, np.float32)


def _longest(runs: Runs) -> int:
    """The most keys that one row sees."""
    return int(np.add.reduceat(runs.lengths, runs.first[:-1]).max())


def _stores(backend: CpuBackend, layers: Sequence[int]) -> np.ndarray[Any, Any]:
    found = backend.stores()
    pairs = [found[layer] for layer in layers]
    return np.array([(group, store.ctypes.data, store.shape[0]) for group, store in pairs])


def _matrices(model: Any) -> Iterator[Floats]:
    for layer in model.model.layers:
        for linear in _projections(layer):
            yield linear.weight.detach().numpy()
    yield model.lm_head.weight.detach().numpy()


def _table(packed: Sequence[blocks.Packed], weights: Iterator[Floats]) -> np.ndarray[Any, Any]:
    """Weights.matrices: every second product of a layer adds to what is there."""
    rows, start = [], 0
    for place, (one, weight) in enumerate(zip(packed, weights, strict=True)):
        start = 0 if place % 4 == 0 else start
        is_head, data = place == len(packed) - 1, one.data
        own = -1 if is_head else start
        adds = place % 2 == 1
        rows.append((data.ctypes.data, one.bits, len(weight), data.shape[1], own, adds))
        start += len(weight)
    return np.array(rows, np.int64)


def _weights_without_matrices(model: Any) -> Weights:
    layers = list(model.model.layers)
    biases = [_biases(layer) for layer in layers]
    norms = [
        norm
        for layer in layers
        for norm in (layer.stock.input_layernorm, layer.stock.post_attention_layernorm)
    ]
    norms.append(model.model.norm)
    first = layers[0]
    heads = [(layer.q_norm, layer.k_norm) for layer in layers if layer.q_norm is not None]
    return Weights(
        matrices=np.zeros((1, 6), np.int64),
        biases=np.stack(biases) if any(map(np.any, biases)) else np.zeros((1, 0), np.float32),
        norms=np.stack([_numbers(norm.weight) for norm in norms]),
        head_norms=np.stack([[_numbers(n.weight) for n in pair] for pair in heads])
        if heads
        else np.zeros((len(layers), 2, 0), np.float32),
        epsilon=np.float32(norms[0].variance_epsilon),
        head_epsilon=np.float32(heads[0][0].variance_epsilon if heads else 0.0),
        scale=np.float32(first.call.scale),
    )


def _biases(layer: JoinedLayer) -> Floats:
    """All four products' of a layer, zeros where there are none."""
    return np.concatenate(
        [
            np.zeros(linear.weight.shape[0], np.float32)
            if linear.bias is None
            else _numbers(linear.bias)
            for linear in _projections(layer)
        ]
    )


def _numbers(values: Tensor) -> Floats:
    made: Floats = values.detach().float().numpy()
    return made
