"""The only forward pass: packs a step's chunks in one row, runs the stock model, draws ids.

The model is called with `input_ids` [1, T], `position_ids` [1, T] and the attention backend; only
rows that draw pay for the vocabulary (`logits_to_keep`). Knows no queue and no mailbox; called by
engine.py on its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve.engine import modules, sampling
from serve.engine.attention import AttentionBackend, Layout, TorchBackend, probe
from serve.engine.attention_cpu import CpuBackend
from serve.engine.cache import KVCache
from serve.engine.config import EngineConfig
from serve.engine.sampling import Draw
from serve.engine.scheduler import Chunk
from serve.engine.sizing import size_cache

# Forward's arguments for one step from (model, chunks, ids [1, T], positions [1, T]). A model that
# sees replaces ids by embeddings here, and positions by its own, for the chunks whose prompt has
# `inputs`.
StepInputs = Callable[[Any, Sequence[Chunk], Tensor, Tensor], dict[str, Any]]


def token_inputs(
    model: Any, chunks: Sequence[Chunk], ids: Tensor, positions: Tensor
) -> dict[str, Any]:
    return {"input_ids": ids, "position_ids": positions}


class Runner:
    def __init__(
        self,
        model: Any,
        backend: AttentionBackend,
        block_size: int,
        device: torch.device,
        inputs: StepInputs = token_inputs,
    ) -> None:
        self._model = model
        self._backend = backend
        self._block_size = block_size
        self._device = device
        self._inputs = inputs

    @property
    def vocabulary(self) -> int:
        """How many ids the model reads and writes."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    def free_memory(self) -> None:
        """Give cached device memory back before trying again with less."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[Draw]:
        """Compute the chunks (decodes first) and draw for those that end at their sequence's last
        id, in order."""
        logits = self.forward(chunks)
        return sampling.draw(logits, [c.sequence for c in chunks if c.draws])

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """[rows that draw, vocabulary]"""
        layout = self._layout(chunks)
        self._backend.begin(layout)
        ids: list[int] = []
        for chunk in chunks:
            ids += chunk.sequence.ids[chunk.start : chunk.end]
        lasts = [
            int(end) - 1
            for chunk, end in zip(chunks, layout.query_start[1:], strict=True)
            if chunk.draws
        ]
        out = self._model(
            **self._inputs(
                self._model,
                chunks,
                torch.tensor([ids], device=self._device),
                torch.from_numpy(layout.positions)[None].to(self._device),
            ),
            use_cache=False,
            logits_to_keep=torch.tensor(lasts, dtype=torch.long, device=self._device),
            paged=self._backend,
        )
        logits: Tensor = out.logits[0]
        return logits

    def _layout(self, chunks: Sequence[Chunk]) -> Layout:
        return Layout(
            starts=[chunk.start for chunk in chunks],
            counts=[chunk.count for chunk in chunks],
            tables=[chunk.sequence.tables for chunk in chunks],
            block_size=self._block_size,
            decodes=next((i for i, c in enumerate(chunks) if c.count > 1), len(chunks)),
        )


def create_runner(
    model: Any,
    device: torch.device,
    *,
    context_length: int,
    config: EngineConfig,
    inputs: StepInputs = token_inputs,
) -> tuple[Runner, KVCache, int]:
    """Look at the model, size the cache, and make what runs it. The third value is the context
    length that the cache can hold."""
    if device.type == "cpu" and config.fast_layers:
        modules.install(model, int8=config.int8)
    shapes = probe(model, device)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    size = size_cache(
        shapes,
        _budget_bytes(device, config),
        itemsize=dtype.itemsize,
        block_size=config.block_size,
        context_length=context_length,
        max_running=config.max_running,
        chunk=config.prefill_chunk,
    )
    make = CpuBackend if device.type == "cpu" else TorchBackend
    backend = make(shapes, size.groups, config.block_size, dtype, device)
    cache = KVCache(size.groups, config.block_size, size.context_length + 1)
    runner = Runner(model, backend, config.block_size, device, inputs)
    return runner, cache, size.context_length


def _budget_bytes(device: torch.device, config: EngineConfig) -> int:
    if config.kv_cache_gb is not None:
        return int(config.kv_cache_gb * 2**30)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.8)
    return _free_ram_bytes() // 4


def _free_ram_bytes() -> int:
    """Memory the machine could give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 2**30
