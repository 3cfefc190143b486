"""A CPU's decode steps without torch's hundreds of small operations.

A row of a decode step is one sequence's next id, and rows do not meet but in the weights. So they
are dealt to as many threads as there are cores, and each thread takes its rows through all layers
alone: per layer one compiled attention call and one ONNX Runtime call. No
thread waits for another before the step's end. Prompts go through the stock model as before; both
share the cache. Inputs in 8 bits enlarge the last bit's differences between batches until draws
differ, so a step with a seeded request runs the stock model too. Stands in for the model's forward
(runner.py puts it there); knows no requests.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serve.engine import graphs
from serve.engine.attention_cpu import CpuBackend, Runs
from serve.engine.attention_jit import Attend, compile_attention
from serve.engine.graphs import Floats
from serve.engine.modules import JoinedLayer

log = logging.getLogger(__name__)

MODELS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
_MIN_WEIGHTS = 10_000_000  # building takes seconds; a smaller model is fast either way
_WORTH = 0.85  # more threads a call must take less than this share of the time


def fits(model: Any) -> bool:
    """Whether `model` is one whose decode steps this module can compute."""
    if type(model).__name__ not in MODELS:
        return False
    layers = list(model.model.layers)
    linears = [p for layer in layers if isinstance(layer, JoinedLayer) for p in _projections(layer)]
    return (
        all(isinstance(layer, JoinedLayer) for layer in layers)
        and model.dtype == torch.float32
        and all(linear.weight.shape[1] % graphs.BLOCK == 0 for linear in linears)
        and sum(linear.weight.numel() for linear in linears) >= _MIN_WEIGHTS
    )


def _projections(layer: JoinedLayer) -> tuple[Any, ...]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


class Decoder:
    """`model` after modules.py has joined its layers. Its forward afterwards: `forward`."""

    def __init__(self, model: Any) -> None:
        began = time.monotonic()
        first = model.model.layers[0]
        cores = os.cpu_count() or 1
        with ThreadPoolExecutor(1) as beside:
            compiling = beside.submit(compile_attention, first.heads, first.kv_heads, first.dim)
            self._threads = _threads_a_call(first, cores)
            layers = list(model.model.layers)
            self._opening = graphs.opening(first, self._threads)
            self._between = [
                graphs.between(layer, following, self._threads)
                for layer, following in pairwise(layers)
            ]
            self._closing = graphs.closing(layers[-1], model.model.norm, self._threads)
            self._parts = max(1, cores // self._threads)
            weight = model.lm_head.weight.detach().numpy()
            self._pieces = graphs.heads(weight, self._parts, self._threads)
            self._numbers = [layer.layer for layer in layers]
            self._attend: Attend = compiling.result()
        self._model = model
        self._stock = model.forward
        self._embedding = model.get_input_embeddings().weight.detach().numpy()
        self._heads, self._kv_heads, self._dim = first.heads, first.kv_heads, first.dim
        self._scale = np.float32(first.call.scale)
        self._pool = ThreadPoolExecutor(self._parts, thread_name_prefix="decode")
        log.info(
            "Decode steps run as %d x %d threads; made in %.1f s",
            self._parts,
            self._threads,
            time.monotonic() - began,
        )

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward's keywords, of those the runner uses. Decodes come first in a step."""
        backend = kwargs.get("paged")
        if not isinstance(backend, CpuBackend) or "input_ids" not in kwargs or args:
            return self._stock(*args, **kwargs)
        count = backend.layout.decodes
        if not count or backend.layout.is_exact:
            return self._stock(**kwargs)
        ids, positions = kwargs["input_ids"][0], kwargs["position_ids"][0]
        keep: Tensor = kwargs["logits_to_keep"]
        logits = self._decode(ids[:count], positions[:count], backend, keep[keep < count])
        if count < ids.shape[0]:
            backend.begin(backend.layout.after(count))
            kwargs |= {
                "input_ids": ids[None, count:],
                "position_ids": positions[None, count:],
                "logits_to_keep": keep[keep >= count] - count,
            }
            logits = torch.cat([logits, self._stock(**kwargs).logits[0]])
        return SimpleNamespace(logits=logits[None])

    def _decode(self, ids: Tensor, positions: Tensor, backend: CpuBackend, drawn: Tensor) -> Tensor:
        """[rows that draw, vocabulary]"""
        rows = ids.shape[0]
        hidden = self._embedding[ids.numpy()]
        turn = self._model.model.rotary_emb(torch.from_numpy(hidden)[None], positions[None])
        cos, sin = (part[0].numpy() for part in turn)
        bounds = np.linspace(0, rows, min(self._parts, rows) + 1).astype(int)
        pieces = [
            (hidden[low:high], cos[low:high], sin[low:high], backend.runs(low, high))
            for low, high in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        stores = backend.stores()
        others = [self._pool.submit(self._through, *piece, stores) for piece in pieces[1:]]
        parts = [self._through(*pieces[0], stores), *(other.result() for other in others)]
        return torch.from_numpy(self._head(np.concatenate(parts)[drawn.numpy()]))

    def _head(self, x: Floats) -> Floats:
        """All rows by every thread, over its piece of the vocabulary: even one row keeps all
        threads busy."""
        logits = np.empty((x.shape[0], self._embedding.shape[0]), np.float32)

        def compute(session: Any, columns: slice) -> None:
            (logits[:, columns],) = session.run(None, {"x": x})

        if not x.shape[0]:
            return logits
        first, *rest = self._pieces
        others = [self._pool.submit(compute, *piece) for piece in rest]
        compute(*first)
        for other in others:
            other.result()
        return logits

    def _through(
        self, x: Floats, cos: Floats, sin: Floats, runs: Sequence[Runs], stores: Mapping[int, Any]
    ) -> Floats:
        """Some rows through all layers, on the thread that calls: what the head reads."""
        rows = x.shape[0]
        longest = max(_longest(run) for run in runs)
        seen = np.empty((rows, self._heads, self._dim), np.float32)
        scores = np.empty((self._heads, longest), np.float32)
        powers = np.empty((self._heads, longest), np.int32)
        (packed,) = self._opening.run(None, {"x": x})
        for number, session in zip(self._numbers, (*self._between, self._closing), strict=True):
            group, store = stores[number]
            run = runs[group]
            self._attend(
                packed.reshape(rows, -1, self._dim),
                cos,
                sin,
                store,
                run.slots,
                run.first,
                run.starts,
                run.lengths,
                self._scale,
                seen,
                scores,
                powers,
            )
            x, *more = session.run(None, {"x": x, "seen": seen.reshape(rows, -1)})
            packed = more[0] if more else packed
        return x


def _longest(runs: Runs) -> int:
    """The most keys that one row sees."""
    return int(np.add.reduceat(runs.lengths, runs.first[:-1]).max())


def _threads_a_call(layer: JoinedLayer, cores: int) -> int:
    """How many threads one row's products are worth, measured on one layer: few for small ones,
    which are over before another thread wakes."""
    best, seconds = 1, _seconds(layer, 1)
    count = 2
    while count <= cores:
        took = _seconds(layer, count)
        if took < _WORTH * seconds:
            best, seconds = count, took
        count *= 2
    return best


def _seconds(layer: JoinedLayer, threads: int) -> float:
    session = graphs.between(layer, layer, threads)
    inputs = {
        "x": np.ones((1, layer.out.weight.shape[0]), np.float32),
        "seen": np.ones((1, layer.out.weight.shape[1]), np.float32),
    }
    goes = []
    for _ in range(10):
        began = time.perf_counter()
        session.run(None, inputs)
        goes.append(time.perf_counter() - began)
    return min(goes)
