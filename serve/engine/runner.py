"""The only forward pass: packs a step's chunks in one row, runs the stock model, draws ids.

The model is called with `input_ids` [1, T], `position_ids` [1, T] and the attention backend; only
rows that draw pay for the vocabulary (`logits_to_keep`). Knows no queue and no mailbox; called by
engine.py on its thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from serve.engine import modules, sampling
from serve.engine.attention import AttentionBackend, Layout, Probe, TorchBackend, probe
from serve.engine.attention_cpu import CpuBackend
from serve.engine.cache import KVCache
from serve.engine.config import EngineConfig
from serve.engine.sampling import Draw
from serve.engine.scheduler import Chunk
from serve.engine.sizing import CacheSize, LayerShape, size_cache
from serve.errors import OutOfMemory

if TYPE_CHECKING:
    from serve.engine.decoder import Decoder
    from serve.engine.gpu import GpuSteps

log = logging.getLogger(__name__)

LEAST_CONTEXT = 256
"""Tokens; a shorter context holds no conversation."""

# Forward's arguments for one step from (model, chunks, ids [1, T], positions [1, T]). A model that
# sees replaces ids by embeddings here, and positions by its own, for the chunks whose prompt has
# `inputs`.
StepInputs = Callable[[Any, Sequence[Chunk], Tensor, Tensor], dict[str, Any]]


# How far the chunks' rotary positions are off, () for not at all; None when the step needs inputs
# of its own and cannot be a captured one.
Shifts = Callable[[Sequence[Chunk]], Sequence[int] | None]


def no_shifts(chunks: Sequence[Chunk]) -> Sequence[int]:
    return ()


def token_inputs(
    model: Any, chunks: Sequence[Chunk], ids: Tensor, positions: Tensor
) -> dict[str, Any]:
    return {"input_ids": ids, "position_ids": positions}


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way: one id for each of its chunks, which nobody has read yet."""

    chunks: Sequence[Chunk]
    place: int


class Runner:
    def __init__(
        self,
        model: Any,
        backend: AttentionBackend,
        block_size: int,
        device: torch.device,
        inputs: StepInputs = token_inputs,
        steps: GpuSteps | None = None,
        shifts: Shifts = no_shifts,
        decoder: Decoder | None = None,
    ) -> None:
        self._model = model
        self._decoder = decoder
        self._shifts = shifts
        self._steps = steps
        self._backend = backend
        self._block_size = block_size
        self._device = device
        self._inputs = inputs
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    @property
    def vocabulary(self) -> int:
        """How many ids the model reads and writes."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    def prepare(self, threads: int | None) -> None:
        """On the engine's thread, before the first step: how many threads torch uses is a
        property of the thread that calls it. All cores by default: measured on two, the second
        one gains 15 % for 8 streams, and requests' own work is a few percent of a core."""
        if self._device.type == "cpu":
            torch.set_num_threads(threads or os.cpu_count() or 1)

    def beside(self, work: Callable[[], None]) -> bool:
        """Whether each `run` from now on calls `work` once, at the moment from which it does not
        need Python's lock. Work that wakes other threads costs it least there: elsewhere they take
        the lock while every core waits for the next step to begin."""
        if self._decoder is None:
            return False
        self._decoder.beside = work
        return True

    def free_memory(self) -> None:
        """Give cached device memory back before trying again with less."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[Draw]:
        """Compute the chunks (decodes first) and draw for those that end at their sequence's last
        id, in order."""
        shifts = self._shifts(chunks)
        if self._steps is not None and shifts is not None:
            plain = self._steps.plain_draws([chunk for chunk in chunks if chunk.draws])
            if plain is not None:
                layout, ids, rows = self._pack(chunks, shifts)
                return self._steps.draw(layout, ids, rows, plain)
        drawing = [chunk.sequence for chunk in chunks if chunk.draws]
        if any(choice.matcher is not None for choice in drawing):
            pending = self._beside.submit(sampling.fill_masks, drawing, self.vocabulary)
            logits = self.forward(chunks)
            return sampling.draw(logits, drawing, pending.result())
        logits = self.forward(chunks)
        return sampling.draw(logits, drawing) if drawing else []

    def launch(self, chunks: Sequence[Chunk], after: Launched | None) -> Launched | None:
        """Begin a step of one id each and return while the device computes it; None when `run` has
        to do it. Ids not known yet are taken where `after`, the step under way, draws them."""
        shifts = self._shifts(chunks)
        if self._steps is None or shifts is None or any(chunk.count > 1 for chunk in chunks):
            return None
        if after is None and not all(chunk.draws for chunk in chunks):
            return None
        layout, plain = self._layout(chunks, shifts), self._steps.plain_draws(chunks)
        if plain is None or not self._steps.can_replay(layout):
            return None
        rows = () if after is None else after.chunks
        row_of = {chunk.sequence: row for row, chunk in enumerate(rows)}
        ids, sources = [], []
        for chunk in chunks:
            known = chunk.sequence.ids
            is_known = chunk.start < len(known)
            ids.append(known[chunk.start] if is_known else 0)
            sources.append(-1 if is_known else row_of[chunk.sequence])
        every = range(len(chunks))
        return Launched(chunks, self._steps.launch(layout, ids, every, plain, sources))

    def take(self, launched: Launched) -> list[Draw]:
        """Wait for a launched step: what each of its chunks drew."""
        assert self._steps is not None, "it was launched by nobody"
        return self._steps.take(launched.place, range(len(launched.chunks)))

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """[rows that draw, vocabulary]"""
        shifts = self._shifts(chunks)
        if self._steps is not None and shifts is not None:
            return self._steps.logits(*self._pack(chunks, shifts))
        layout, ids, lasts = self._pack(chunks, ())
        self._backend.begin(layout)
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

    def _pack(
        self, chunks: Sequence[Chunk], shifts: Sequence[int]
    ) -> tuple[Layout, list[int], list[int]]:
        """The step's layout, its new ids, and which of them draw."""
        layout = self._layout(chunks, shifts)
        ids: list[int] = []
        for chunk in chunks:
            ids += chunk.sequence.ids[chunk.start : chunk.end]
        lasts = [
            int(end) - 1
            for chunk, end in zip(chunks, layout.query_start[1:], strict=True)
            if chunk.draws
        ]
        return layout, ids, lasts

    def _layout(self, chunks: Sequence[Chunk], shifts: Sequence[int]) -> Layout:
        return Layout(
            starts=[chunk.start for chunk in chunks],
            counts=[chunk.count for chunk in chunks],
            tables=[chunk.sequence.tables for chunk in chunks],
            block_size=self._block_size,
            decodes=next((i for i, c in enumerate(chunks) if c.count > 1), len(chunks)),
            shifts=shifts,
            is_exact=any(chunk.sequence.request.is_seeded for chunk in chunks),
            prompts=[chunk.sequence.request.prompt_length for chunk in chunks],
        )


def fitted(config: EngineConfig, device: torch.device) -> EngineConfig:
    """With what it left open chosen for the device and what is free of its memory."""
    is_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] / 2**30 if is_cuda else 0.0
    return config.for_device(device.type, free)


def create_runner(
    model: Any,
    device: torch.device,
    *,
    context_length: int,
    config: EngineConfig,
    inputs: StepInputs = token_inputs,
    shifts: Shifts = no_shifts,
) -> tuple[Runner, KVCache, int]:
    """Look at the model, size the cache, and make what runs it. The third value is the context
    length that the cache can hold."""
    decoder = None
    if device.type == "cpu" and config.fast_layers:
        decoder = _quicken(model, config.packs_weights)
    config = fitted(config, device)
    shapes = probe(model, device)
    has_kernels = device.type == "cuda" and _fits_kernels(model, shapes, device)
    if config.dense_bits == 8:
        _hold_dense_in_8_bits(model, has_kernels)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    size = size_cache(
        shapes,
        _budget_bytes(model, device, config, inputs),
        itemsize=dtype.itemsize,
        block_size=config.block_size,
        context_length=context_length,
        max_running=config.max_running,
        chunk=config.prefill_chunk,
    )
    _tell_context(size, context_length, is_measured=config.kv_cache_gb is None)
    most = size.context_length + 1
    cache = KVCache(size.groups, config.block_size, most, seeded_apart=decoder is not None)
    if has_kernels:
        from serve.engine import gpu

        backend, steps = gpu.create_steps(
            model, shapes, size.groups, config, size.context_length, dtype, device
        )
        runner = Runner(model, backend, config.block_size, device, inputs, steps, shifts)
        return runner, cache, size.context_length
    make = CpuBackend if device.type == "cpu" else TorchBackend
    plain = make(shapes, size.groups, config.block_size, dtype, device)
    runner = Runner(model, plain, config.block_size, device, inputs, None, shifts, decoder)
    return runner, cache, size.context_length


def _fits_kernels(model: Any, shapes: Sequence[LayerShape], device: torch.device) -> bool:
    from serve.engine import attention_gpu  # needs Triton, which comes with torch for CUDA only

    return attention_gpu.supports(shapes, model.config, device)


def _hold_dense_in_8_bits(model: Any, has_kernels: bool) -> None:
    if has_kernels:
        from serve.engine import gpu
        from serve.engine.kernels import w8
    if not has_kernels or not gpu.is_fused(model):
        log.warning("DENSE_BITS=8 has no effect: it is for gpt-oss in MXFP4 on a GPU.")
        return
    freed = w8.hold_dense(model)
    log.info("Attention and vocabulary weights are held in 8 bits: %.2f GB less.", freed / 1e9)


def _tell_context(size: CacheSize, wanted: int, *, is_measured: bool) -> None:
    """Says where a context is cut. Raises OutOfMemory where what is left would be of no use."""
    held = size.context_length
    log.info("KV cache: %.2f GB, a context of %d tokens.", size.bytes / 1e9, held)
    if held == wanted:
        return
    if is_measured and held < LEAST_CONTEXT:
        raise OutOfMemory(
            f"Beside the model's weights there is memory for {held} tokens of context only. Free "
            "some, or name a smaller model or one with smaller weights in MODEL_IDS."
        )
    log.warning("The model's context of %d tokens is cut to the %d that fit.", wanted, held)


def _quicken(model: Any, packs_weights: bool) -> Decoder | None:
    """A CPU's equivalents of stock layers; and of the whole forward, where the model fits."""
    if not packs_weights:
        modules.install(model, packs=False)
        return None
    # Numba is loaded only where it is used.
    from serve.engine import decoder

    compiling = decoder.begin_compiling(model)
    modules.install(model, packs=True)
    if not decoder.fits(model):
        return None
    made = decoder.Decoder(model, compiling)
    model.forward = made.forward
    return made


def _budget_bytes(
    model: Any, device: torch.device, config: EngineConfig, inputs: StepInputs
) -> int:
    if config.kv_cache_gb is not None:
        return int(config.kv_cache_gb * 2**30)
    if device.type == "cuda":
        return _free_device_bytes(model, device, config, inputs)
    return _free_ram_bytes() // 4


@torch.inference_mode()
def _free_device_bytes(
    model: Any, device: torch.device, config: EngineConfig, inputs: StepInputs
) -> int:
    """What is left beside the largest step there can be: a full prompt chunk and all rows drawn."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    tokens = config.prefill_chunk + config.max_running
    ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device)[None]
    last = torch.arange(config.max_running, device=device)
    logits = model(
        **inputs(model, [], ids, positions), use_cache=False, logits_to_keep=last, paged=Probe()
    ).logits[0]
    logits.float().softmax(-1).cumsum(-1).sort(-1)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del logits
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    log.info("%.2f GB are free; the largest step takes %.2f of them.", free / 1e9, peak / 1e9)
    return max(0, int(free - 1.25 * peak - 0.03 * total))


def _free_ram_bytes() -> int:
    """Memory the machine could give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 2**30
