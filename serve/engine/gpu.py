"""Steps on an NVIDIA GPU: our attention kernels, CUDA graphs of decode steps, ids drawn there.

`GpuSteps` runs a whole step: when every sequence brings one token, a graph captured for that batch
size (rounded up; the rest is padding that stores nothing) is replayed; anything else runs launch by
launch. gpt-oss with MXFP4 experts goes through FusedGptOss instead of its modules. What only a
temperature shapes is drawn in the graph too, and then a step need not be waited for: the next one
takes the ids where the last one left them. Knows layouts and tensors, no requests; runner.py calls
it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.engine import sampling
from serve.engine.attention import Layout
from serve.engine.attention_gpu import KernelBackend
from serve.engine.cache import GroupSpec
from serve.engine.config import EngineConfig
from serve.engine.kernels.draws import draw, follow
from serve.engine.kernels.experts import Mxfp4Experts
from serve.engine.kernels.gpt_oss import Batch, FusedGptOss
from serve.engine.sampling import Draw
from serve.engine.scheduler import Chunk
from serve.engine.sizing import LayerShape
from serve.engine.staging import StagedInputs, StagedTables
from serve.values import Sampling

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Batch sizes that graphs are captured for."""

_KINDS = (2, 5, 17, 33, 65, 129, 257, 1025)
"""Token counts of which each takes other cuts of the kernels than the one before."""

# float32 [2, rows]: temperatures (0: greedy) and noise in [0, 1).
Draws = npt.NDArray[np.float32]

# Logits [rows, vocabulary] of a batch's named rows (None: of all).
Step = Callable[[Batch, Tensor | None], Tensor]


def plain_temperature(o: Sampling) -> float | None:
    """The temperature (0: greedy) when nothing else shapes a row's distribution, else None: such a
    row takes sampling.draw."""
    is_cut = o.top_p < 1 or o.top_k or o.min_p or o.logit_bias or o.min_tokens
    is_penalized = o.frequency_penalty or o.presence_penalty or o.repetition_penalty != 1.0
    if is_cut or is_penalized or o.logprobs is not None:
        return None
    return 0.0 if o.temperature <= sampling.GREEDY_BELOW else o.temperature


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """sampling.uniform of each pair."""
    mixed = _mix(np.array(seeds, np.uint64)) ^ np.array(positions, np.uint64)
    return (_mix(mixed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """sampling.mix of each."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def stock_step(model: Any, backend: KernelBackend) -> Step:
    """The stock model's forward as a step."""

    def step(batch: Batch, rows: Tensor | None) -> Tensor:
        backend.batch = batch
        out = model(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=0 if rows is None else rows,
            paged=backend,
        )
        logits: Tensor = out.logits[0]
        return logits

    return step


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor


class GpuSteps:
    """`columns[g]`: the most blocks a sequence has in group g.

    Two launched steps may be under way, each in its place, 0 or 1: the memory that its inputs are
    sent from and its ids come back to.
    """

    def __init__(
        self,
        step: Step,
        backend: KernelBackend,
        columns: Sequence[int],
        max_running: int,
    ) -> None:
        self._step = step
        self._backend = backend
        self._device = backend.device
        sizes = [size for size in SIZES if size < max_running]
        self._sizes = [*sizes, min(max_running, SIZES[-1])]
        most, groups = self._sizes[-1], len(columns)
        self._inputs = StagedInputs(most, groups, self._device)
        self._tables = [StagedTables(most, width, self._device) for width in columns]
        self._one_each = torch.arange(most + 1, dtype=torch.int32, device=self._device)
        self._ids, self._drawn = torch.zeros((2, most), dtype=torch.int64, device=self._device)
        is_cuda = self._device.type == "cuda"
        self._out = torch.empty((2, most), dtype=torch.int64, pin_memory=is_cuda)
        self._place = 0
        self._done: tuple[torch.cuda.Event, ...] = ()
        self._temperatures: dict[int, tuple[Sampling, float | None]] = {}
        self._graphs: dict[int, _Graph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every size, the largest first so that the others fit in its memory."""
        began = time.monotonic()
        self._done = (torch.cuda.Event(), torch.cuda.Event())
        self._inputs.host[0].pad(0)
        self._inputs.push(0)
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            self._compute(size)  # compiles what this size needs, outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._compute(size)
            self._graphs[size] = _Graph(graph, logits)
        log.info("Captured %d graphs in %.1f s", len(self._graphs), time.monotonic() - began)

    @torch.inference_mode()
    def warm(self, most_tokens: int, context_length: int) -> None:
        """Compile what prompts need, so that no request waits for a compiler: a step of each kind
        of size, as sequences of at most the context's length whose tokens are stored nowhere."""
        for tokens in (*_KINDS, most_tokens):
            if tokens > most_tokens:
                continue
            batch = self._prompts(tokens, context_length)
            logits = self._step(batch, batch.ids[-1:])
            found = torch.empty(1, dtype=torch.int64, device=self._device)
            temperatures, noise = torch.zeros((2, 1), dtype=torch.float32, device=self._device)
            draw(logits, temperatures, noise, found)
        torch.cuda.synchronize()

    def _prompts(self, tokens: int, longest: int) -> Batch:
        """So many tokens as few new sequences, nothing of which is kept."""
        counts = [min(longest, tokens - start) for start in range(0, tokens, longest)]
        zeros = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        lengths = torch.tensor(counts, dtype=torch.int32, device=self._device)
        widths = [table.device.shape[1] for table in self._tables]
        return Batch(
            ids=zeros,
            positions=torch.arange(tokens, device=self._device) % longest,
            slots=tuple(zeros - 1 for _ in widths),
            tables=tuple(lengths.new_zeros((len(counts), width)) for width in widths),
            lengths=lengths,
            query_start=torch.tensor([0, *counts], device=self._device).cumsum(0).int(),
            decodes=0,
            longest=max(counts),
        )

    def can_replay(self, layout: Layout) -> bool:
        return layout.decodes == len(layout.counts) <= self._sizes[-1]

    def plain_draws(self, chunks: Sequence[Chunk]) -> Draws | None:
        """The temperature and noise of each chunk's draw, or None when one needs more than
        those."""
        temperatures = []
        for chunk in chunks:
            options = chunk.sequence.request.generation.sampling
            known = self._temperatures.get(id(options))
            if known is None or known[0] is not options:
                if len(self._temperatures) > 4096:
                    self._temperatures.clear()
                known = self._temperatures[id(options)] = (options, plain_temperature(options))
            if known[1] is None or chunk.sequence.matcher is not None:
                return None
            temperatures.append(known[1])
        seeds = [chunk.sequence.seed for chunk in chunks]
        drawn = [chunk.end - chunk.sequence.request.prompt_length for chunk in chunks]
        return np.stack((np.array(temperatures), uniforms(seeds, drawn))).astype(np.float32)

    def logits(self, layout: Layout, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
        """The logits of `rows`, on the device, to be used before the next step."""
        if self.can_replay(layout):
            self._wait(self.launch(layout, ids, rows, np.zeros((2, len(rows)), np.float32)))
            return self._logits(self._size(len(ids)))[list(rows)]
        return self._mixed(layout, ids, rows)

    @torch.inference_mode()
    def draw(
        self,
        layout: Layout,
        ids: Sequence[int],
        rows: Sequence[int],
        draws: Draws,
    ) -> list[Draw]:
        """The ids that `rows` draw by their temperatures and noise."""
        if self.can_replay(layout):
            return self.take(self.launch(layout, ids, rows, draws), rows)
        logits = self._mixed(layout, ids, rows)
        if not rows:
            return []
        found = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        temperatures, noise = torch.from_numpy(draws).to(self._device)
        draw(logits, temperatures, noise, found)
        return _outcomes(found.tolist())

    @torch.inference_mode()
    def launch(
        self,
        layout: Layout,
        ids: Sequence[int],
        rows: Sequence[int],
        draws: Draws,
        sources: Sequence[int] = (),
    ) -> int:
        """Begin a step of one token each, and return its place without waiting for it; can_replay
        must have said yes. `draws` are those of `rows`. A row whose source is not negative takes,
        instead of its id, what that row of the step before drew. The place must not be under way:
        of two launched steps the first is taken before a third is launched."""
        count, block = len(ids), layout.block_size
        place = self._place = 1 - self._place
        self._wait(place)  # its memory may still be read by a step that nobody took
        inputs, starts = self._inputs.host[place], np.array(layout.starts)
        inputs.pad(count)
        inputs.numbers[0, :count] = ids
        inputs.numbers[1, :count] = layout.rotary_starts  # shifted behind a picture
        inputs.numbers[2, : len(sources)] = sources
        inputs.lengths[:count] = starts + 1
        inputs.draws[:, list(rows)] = draws
        column, offset, every = starts // block, starts % block, np.arange(count)
        for group, tables in enumerate(self._tables):
            tables.update(place, [held[group] for held in layout.tables])
            blocks = tables.host[every, column].astype(np.int64)
            inputs.numbers[3 + group, :count] = blocks * block + offset
        self._enqueue(place, count)
        return place

    def take(self, place: int, rows: Sequence[int]) -> list[Draw]:
        """Wait for a launched step: the ids its `rows` drew."""
        self._wait(place)
        every = self._out[place].tolist()
        return _outcomes([every[row] for row in rows])

    # -- what is the device's: tests on a CPU put their own in the place of these four -------------

    def _enqueue(self, place: int, count: int) -> None:
        """Everything a launched step does on the device, in this order."""
        self._inputs.push(place)
        for tables in self._tables:
            tables.push(place)
        self._replay(self._size(count))
        self._out[place, :count].copy_(self._drawn[:count], non_blocking=True)
        self._done[place].record()

    def _wait(self, place: int) -> None:
        """Until the step launched last in this place is done."""
        self._done[place].synchronize()

    def _replay(self, size: int) -> None:
        self._graphs[size].graph.replay()

    def _logits(self, size: int) -> Tensor:
        """[size, vocabulary] of the last step of this size; overwritten by the next."""
        return self._graphs[size].logits

    @torch.inference_mode()
    def _mixed(self, layout: Layout, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Any step, launch by launch: logits of the named rows."""
        batch = self._backend.upload(layout, np.asarray(ids, np.int64))
        wanted = torch.tensor(rows, dtype=torch.long, device=self._device)
        return self._step(batch, wanted)

    def _size(self, count: int) -> int:
        return next(size for size in self._sizes if size >= count)

    def _compute(self, size: int) -> Tensor:
        """The work of a step of `size` rows, all of it on the device."""
        given, _, sources = self._inputs.device_numbers[:3, :size]
        follow(given, sources, self._drawn, self._ids[:size])
        logits = self._step(self._batch(size), None)
        temperatures, noise = self._inputs.device_draws[:, :size]
        draw(logits, temperatures, noise, self._drawn[:size])
        return logits

    def _batch(self, size: int) -> Batch:
        numbers = self._inputs.device_numbers
        return Batch(
            ids=self._ids[:size],
            positions=numbers[1, :size],
            slots=tuple(numbers[3 + g, :size] for g in range(len(self._tables))),
            tables=tuple(table.device[:size] for table in self._tables),
            lengths=self._inputs.device_lengths[:size],
            query_start=self._one_each[: size + 1],
            decodes=size,
            longest=1,
        )


def _outcomes(ids: list[int]) -> list[Draw]:
    unsound = "The model computed numbers that are not finite."
    return [Draw(i) if i >= 0 else Draw(problem=unsound) for i in ids]


def is_fused(model: Any) -> bool:
    """Whether FusedGptOss computes this model: gpt-oss with MXFP4 experts."""
    layers: Any = getattr(getattr(model, "model", None), "layers", ())
    return bool(layers) and isinstance(getattr(layers[0].mlp, "experts", None), Mxfp4Experts)


def create_steps(
    model: Any,
    shapes: Sequence[LayerShape],
    groups: Sequence[GroupSpec],
    config: EngineConfig,
    context_length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[KernelBackend, GpuSteps]:
    """The backend for `model`, and its steps, compiled and captured. attention_gpu.supports must
    have said yes."""
    backend = KernelBackend(shapes, groups, config.block_size, dtype, device)
    if is_fused(model):
        fast = FusedGptOss(model, backend.keys, backend.values, backend.group_of, context_length)
        step: Step = fast.forward
    else:
        step = stock_step(model, backend)
    columns = [-(-(context_length + 1) // config.block_size) for _ in groups]
    steps = GpuSteps(step, backend, columns, config.max_running)
    steps.warm(config.prefill_chunk + config.max_running, context_length)
    steps.capture()
    return backend, steps
