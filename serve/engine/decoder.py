"""A CPU's decodes and short prompts without torch's hundreds of small operations.

Their rows go through all layers in one compiled function (step_jit.py), which every core runs at
the same time on pieces of the same products; a row's numbers do not depend on the rows beside it.
Long prompts go through the stock model; both share the cache. A product's inputs are rounded to 8
bits. One rounding is enough for decodes; a prompt's many rows lose too much by it, so what it left
is rounded again; and where draws are to be the same in any batch a third time, which is as precise
as float32. Stands in for the model's forward (runner.py puts it
there); knows no requests.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serve.engine import blocks
from serve.engine.attention import Layout
from serve.engine.attention_cpu import CpuBackend, Runs
from serve.engine.blocks import BLOCK, Floats
from serve.engine.modules import JoinedLayer
from serve.engine.products_jit import instructions
from serve.engine.step import Places, Shape, Step, Weights, new_counters, new_step
from serve.engine.step_jit import compile_step

log = logging.getLogger(__name__)

MODELS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
_TERMS, _PROMPT_TERMS, _EXACT_TERMS = 1, 2, 3  # roundings of a product's inputs
_MIN_WEIGHTS = 10_000_000  # building takes seconds; a smaller model is fast either way
_SHORT = 256  # tokens of a prompt, with what of it is in the cache
_SHORT_EXACT = 2048  # tokens of a prompt in a step with a seeded request
_KEPT = 64  # rows of a step whose arrays are kept for the next
_MARGIN = 256  # tokens that rows may grow by before new arrays are made
_MIN_BYTES = 1 << 14  # of a layer's smallest product, for each thread


def begin_compiling(model: Any) -> Future[Any] | None:
    """On a thread of its own, while the stock model's layers are joined; None where there will be
    no use for it."""
    kind = instructions()
    if kind is None or type(model).__name__ not in MODELS or model.dtype != torch.float32:
        return None
    layers = model.model.layers
    stock = layers[0].stock if isinstance(layers[0], JoinedLayer) else layers[0]
    is_small = sum(weight.numel() for weight in layers.parameters()) < _MIN_WEIGHTS
    if is_small or type(stock.self_attn.q_proj) is not torch.nn.Linear:
        return None
    pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
    compiling = pool.submit(compile_step, _shape(model, stock), kind)
    pool.shutdown(wait=False)
    return compiling


def _shape(model: Any, stock: Any) -> Shape:
    attention = stock.self_attn
    return Shape(
        heads=attention.q_proj.out_features // attention.head_dim,
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        dim=attention.head_dim,
        width=attention.o_proj.out_features,
        hidden=stock.mlp.gate_proj.out_features,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        has_head_norms=hasattr(attention, "q_norm"),
    )


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
    """`model` after modules.py has joined its layers. Its forward afterwards: `forward`. `beside`
    is called once in each, where Python's lock is free from then on."""

    def __init__(self, model: Any, compiling: Future[Any] | None = None) -> None:
        began = time.monotonic()
        kind = instructions()
        assert kind is not None, "fits() was not asked"
        layers = list(model.model.layers)
        self._shape = _shape(model, layers[0].stock)
        smallest = min(linear.weight.numel() for linear in _projections(layers[0]))
        self._threads = max(1, min(cores(), smallest // 2 // _MIN_BYTES))
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="decode")
        self._packed = [blocks.packed(blocks.blocks(weight)) for weight in _matrices(model)]
        self._weights = _weights(model, _table(self._packed, _matrices(model)))
        self._last = new_step(self._shape, self._threads)
        self._numbers = [layer.layer for layer in layers]
        self._stores: Places | None = None
        self.beside: Callable[[], None] = _nothing
        self._model = model
        self._stock = model.forward
        self._embedding = model.get_input_embeddings().weight.detach().numpy()
        self._step = compiling.result() if compiling else compile_step(self._shape, kind)
        seconds = time.monotonic() - began
        log.info("Decode steps: %s, %d threads; made in %.1f s", kind, self._threads, seconds)

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward's keywords, of those the runner uses. Decodes come first in a step."""
        backend = kwargs.get("paged")
        if not isinstance(backend, CpuBackend) or "input_ids" not in kwargs or args:
            self.beside()
            return self._stock(*args, **kwargs)
        layout, rows = backend.layout, _own_rows(backend.layout)
        ids, positions = kwargs["input_ids"][0], kwargs["position_ids"][0]
        keep: Tensor = kwargs["logits_to_keep"]
        if rows.all():
            return SimpleNamespace(logits=self._logits(ids, positions, keep, backend)[None])
        if not rows.any():
            self.beside()
            return self._stock(**kwargs)
        own, drawn, sequences = rows.cumsum(0) - 1, rows[keep], range(len(layout.counts))
        logits = torch.empty(len(keep), self._shape.vocabulary)
        backend.begin(layout.only([i for i in sequences if _is_own(layout, i)]))
        logits[drawn] = self._logits(ids[rows], positions[rows], own[keep[drawn]], backend)
        backend.begin(layout.only([i for i in sequences if not _is_own(layout, i)]))
        kwargs |= {
            "input_ids": ids[None, ~rows],
            "position_ids": positions[None, ~rows],
            "logits_to_keep": ((~rows).cumsum(0) - 1)[keep[~drawn]],
        }
        logits[~drawn] = self._stock(**kwargs).logits[0]
        return SimpleNamespace(logits=logits[None])

    def _logits(self, ids: Tensor, positions: Tensor, drawn: Tensor, backend: CpuBackend) -> Tensor:
        """[rows that draw, vocabulary]"""
        if self._stores is None:
            self._stores = _stores(backend, self._numbers)
        step = self._begun(ids, positions, drawn, backend)._replace(stores=self._stores)
        for thread in range(1, self._threads):
            self._pool.submit(self._step, self._weights, step, thread)
        self.beside()
        self._step(self._weights, step, 0)
        return torch.from_numpy(step.logits[:, : self._shape.vocabulary])

    def _begun(self, ids: Tensor, positions: Tensor, drawn: Tensor, backend: CpuBackend) -> Step:
        terms, layout = _TERMS, backend.layout
        if layout.is_exact:
            terms = _EXACT_TERMS
        elif layout.decodes < len(layout.counts):
            terms = max(_TERMS, _PROMPT_TERMS)
        runs = backend.runs()
        hidden = self._embedding[ids.numpy()]
        turn = self._model.model.rotary_emb(torch.from_numpy(hidden)[None], positions[None])
        cos, sin = (part[0].numpy() for part in turn)
        longest = max(_longest(run) for run in runs)
        step = self._room(len(hidden), drawn.shape[0], terms, longest)
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

    def _room(self, rows: int, drawn: int, terms: int, longest: int) -> Step:
        """The last step's arrays, where they fit: new ones come from the system page by page. Its
        counters are not taken over: a thread that is late may still look at them."""
        step = self._last
        held = (len(step.every), len(step.logits), step.terms)
        if held != (rows, drawn, terms) or step.scores.shape[2] < longest:
            step = new_step(
                self._shape,
                self._threads,
                rows=rows,
                drawn=drawn,
                terms=terms,
                longest=longest + _MARGIN,
            )
            if rows <= _KEPT:
                self._last = step
        return step._replace(counters=new_counters(len(self._numbers)))


def _nothing() -> None: ...


def _own_rows(layout: Layout) -> Tensor:
    """Which of a step's rows are computed here."""
    own = [_is_own(layout, i) for i in range(len(layout.counts))]
    return torch.from_numpy(np.repeat(own, layout.counts))


def _is_own(layout: Layout, sequence: int) -> bool:
    """Decodes and short prompts: in a long one each token would read many keys alone, which the
    stock model's attention reads together. Where draws are to be the same in any batch, how a
    prompt was cut must not decide."""
    if sequence < layout.decodes:
        return True
    if layout.is_exact:
        return layout.prompts[sequence] <= _SHORT_EXACT
    return layout.starts[sequence] + layout.counts[sequence] <= _SHORT


def cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many the process may use: those it sees, or fewer where a container's share is less."""
    seen = os.cpu_count() or 1
    try:
        quota, period = limit.read_text().split()
        return max(1, min(seen, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return seen


def _longest(runs: Runs) -> int:
    """The most keys that one row sees."""
    return int(np.add.reduceat(runs.lengths, runs.first[:-1]).max())


def _stores(backend: CpuBackend, layers: Sequence[int]) -> Places:
    found = backend.stores()
    pairs = [found[layer] for layer in layers]
    return np.array([(group, store.ctypes.data, store.shape[0]) for group, store in pairs])


def _matrices(model: Any) -> Iterator[Floats]:
    for layer in model.model.layers:
        for linear in _projections(layer):
            yield linear.weight.detach().numpy()
    yield model.lm_head.weight.detach().numpy()


def _table(packed: Sequence[blocks.Packed], weights: Iterator[Floats]) -> Places:
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


def _weights(model: Any, table: Places) -> Weights:
    layers = list(model.model.layers)
    biases = [_biases(layer) for layer in layers]
    norms = [
        norm
        for layer in layers
        for norm in (layer.stock.input_layernorm, layer.stock.post_attention_layernorm)
    ]
    norms.append(model.model.norm)
    heads = [(layer.q_norm, layer.k_norm) for layer in layers if layer.q_norm is not None]
    return Weights(
        matrices=table,
        biases=np.stack(biases) if any(map(np.any, biases)) else np.zeros((1, 0), np.float32),
        norms=np.stack([_numbers(norm.weight) for norm in norms]),
        head_norms=np.stack([[_numbers(n.weight) for n in pair] for pair in heads])
        if heads
        else np.zeros((len(layers), 2, 0), np.float32),
        epsilon=np.float32(norms[0].variance_epsilon),
        head_epsilon=np.float32(heads[0][0].variance_epsilon if heads else 0.0),
        scale=np.float32(layers[0].call.scale),
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
