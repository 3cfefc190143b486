"""Steps on an NVIDIA GPU: our attention kernels, CUDA graphs of decode steps, ids drawn there.

`GpuSteps` runs a whole step: when every sequence brings one token, a graph captured for that batch
size (rounded up; the rest is padding that stores nothing) is replayed; anything else runs launch by
launch. gpt-oss with MXFP4 experts goes through FusedGptOss instead of its modules. What only a
temperature shapes is drawn in the graph too. Knows layouts and tensors, no requests; runner.py
calls it.
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
from serve.engine.cache import BlockTable, GroupSpec
from serve.engine.config import EngineConfig
from serve.engine.kernels.draws import draw
from serve.engine.kernels.experts import Mxfp4Experts
from serve.engine.kernels.gpt_oss import Batch, FusedGptOss
from serve.engine.sampling import Draw
from serve.engine.sequence import Sequence as Choice
from serve.engine.sizing import LayerShape
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
    drawn: Tensor


class GpuSteps:
    """`columns[g]`: the most blocks a sequence has in group g."""

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
        self._inputs = _Inputs(most, groups, self._device)
        self._tables = [_Tables(most, width, self._device) for width in columns]
        self._one_each = torch.arange(most + 1, dtype=torch.int32, device=self._device)
        self._out = torch.empty(most, dtype=torch.int64, pin_memory=True)
        self._temperatures: dict[int, tuple[Sampling, float | None]] = {}
        self._graphs: dict[int, _Graph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every size, the largest first so that the others fit in its memory."""
        began = time.monotonic()
        self._inputs.pad(0)
        self._inputs.push()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            batch = self._batch(size)
            self._compute(batch)  # compiles what this size needs, outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits, drawn = self._compute(batch)
            self._graphs[size] = _Graph(graph, logits, drawn)
        log.info("Captured %d graphs in %.1f s", len(self._graphs), time.monotonic() - began)

    @torch.inference_mode()
    def warm(self, most_tokens: int) -> None:
        """Compile what prompts need, so that no request waits for a compiler: a step of each kind
        of size, as one sequence whose tokens are stored nowhere."""
        for tokens in (*_KINDS, most_tokens):
            if tokens > most_tokens:
                continue
            count = torch.arange(tokens, device=self._device)
            batch = Batch(
                ids=count * 0,
                positions=count,
                slots=tuple(count * 0 - 1 for _ in self._tables),
                tables=tuple(table.device[:1] * 0 for table in self._tables),
                lengths=torch.tensor([tokens], dtype=torch.int32, device=self._device),
                query_start=torch.tensor([0, tokens], dtype=torch.int32, device=self._device),
                decodes=0,
                longest=tokens,
            )
            logits = self._step(batch, count[-1:])
            found = torch.empty(1, dtype=torch.int64, device=self._device)
            temperatures, noise = torch.zeros((2, 1), dtype=torch.float32, device=self._device)
            draw(logits, temperatures, noise, found)
        torch.cuda.synchronize()

    def can_replay(self, layout: Layout) -> bool:
        return layout.decodes == len(layout.counts) <= self._sizes[-1]

    def plain_draws(self, choices: Sequence[Choice]) -> Draws | None:
        """Each row's temperature and noise, or None when a row needs more than those."""
        temperatures = []
        for choice in choices:
            options = choice.request.generation.sampling
            known = self._temperatures.get(id(options))
            if known is None or known[0] is not options:
                if len(self._temperatures) > 4096:
                    self._temperatures.clear()
                known = self._temperatures[id(options)] = (options, plain_temperature(options))
            if known[1] is None or choice.matcher is not None:
                return None
            temperatures.append(known[1])
        seeds, drawn = [c.seed for c in choices], [c.drawn for c in choices]
        return np.stack((np.array(temperatures), uniforms(seeds, drawn))).astype(np.float32)

    def logits(self, layout: Layout, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
        """The logits of `rows`, on the device, to be used before the next step."""
        if self.can_replay(layout):
            logits, _ = self._replay(layout, ids, rows, np.zeros((2, len(rows)), np.float32))
            return logits[list(rows)]
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
            _, drawn = self._replay(layout, ids, rows, draws)
            every = drawn.tolist()
            return _outcomes([every[row] for row in rows])
        logits = self._mixed(layout, ids, rows)
        if not rows:
            return []
        found = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        temperatures, noise = torch.from_numpy(draws).to(self._device)
        draw(logits, temperatures, noise, found)
        return _outcomes(found.tolist())

    @torch.inference_mode()
    def _replay(
        self,
        layout: Layout,
        ids: Sequence[int],
        rows: Sequence[int],
        draws: Draws,
    ) -> tuple[Tensor, Tensor]:
        """One token each: logits [sequences, vocabulary] on the device (overwritten by the next
        step), and what every row drew, on the host; `draws` are those of `rows`."""
        count, block = len(ids), layout.block_size
        size = next(size for size in self._sizes if size >= count)
        inputs, starts = self._inputs, np.array(layout.starts)
        inputs.pad(count)
        inputs.numbers[0, :count] = ids
        inputs.numbers[1, :count] = layout.rotary_starts  # shifted behind a picture
        inputs.lengths[:count] = starts + 1
        inputs.draws[:, list(rows)] = draws
        column, offset, every = starts // block, starts % block, np.arange(count)
        for group, tables in enumerate(self._tables):
            tables.update([held[group] for held in layout.tables])
            blocks = tables.host[every, column].astype(np.int64)
            inputs.numbers[2 + group, :count] = blocks * block + offset
        inputs.push()
        captured = self._graphs[size]
        captured.graph.replay()
        self._out[:count].copy_(captured.drawn[:count], non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return captured.logits[:count], self._out[:count]

    @torch.inference_mode()
    def _mixed(self, layout: Layout, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Any step, launch by launch: logits of the named rows."""
        batch = self._backend.upload(layout, np.asarray(ids, np.int64))
        wanted = torch.tensor(rows, dtype=torch.long, device=self._device)
        return self._step(batch, wanted)

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self._step(batch, None)
        size = batch.ids.shape[0]
        drawn = torch.empty(size, dtype=torch.int64, device=self._device)
        temperatures, noise = self._inputs.device_draws[:, :size]
        draw(logits, temperatures, noise, drawn)
        return logits, drawn

    def _batch(self, size: int) -> Batch:
        numbers = self._inputs.device_numbers
        return Batch(
            ids=numbers[0, :size],
            positions=numbers[1, :size],
            slots=tuple(numbers[2 + g, :size] for g in range(len(self._tables))),
            tables=tuple(table.device[:size] for table in self._tables),
            lengths=self._inputs.device_lengths[:size],
            query_start=self._one_each[: size + 1],
            decodes=size,
            longest=1,
        )


def _outcomes(ids: list[int]) -> list[Draw]:
    unsound = "The model computed numbers that are not finite."
    return [Draw(i) if i >= 0 else Draw(problem=unsound) for i in ids]


class _Inputs:
    """What changes with every step, in one piece of pinned memory and its copy on the device:
    `numbers` int64 [2 + groups, most] (ids, positions, slots), `lengths` int32 [most], `draws`
    float32 [2, most]."""

    def __init__(self, most: int, groups: int, device: torch.device) -> None:
        self._cuts = ((2 + groups) * most * 8, most * 4, most * 8)
        self._shape = (2 + groups, most)
        self._pinned = torch.zeros(sum(self._cuts), dtype=torch.uint8, pin_memory=True)
        self._device = torch.zeros(sum(self._cuts), dtype=torch.uint8, device=device)
        numbers, lengths, draws = self._views(self._pinned)
        self.numbers, self.lengths, self.draws = numbers.numpy(), lengths.numpy(), draws.numpy()
        self.device_numbers, self.device_lengths, self.device_draws = self._views(self._device)

    def _views(self, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers, lengths, draws = held.split(self._cuts)
        return (
            numbers.view(torch.int64).view(self._shape),
            lengths.view(torch.int32),
            draws.view(torch.float32).view(2, -1),
        )

    def pad(self, start: int) -> None:
        """From row `start` on: nothing stored, no keys seen, greedy."""
        self.numbers[:2, start:] = 0
        self.numbers[2:, start:] = -1
        self.lengths[start:] = 0
        self.draws[:] = 0

    def push(self) -> None:
        self._device.copy_(self._pinned, non_blocking=True)


class _Tables:
    """One group's block tables, row by row; only rows that changed are written, and nothing is
    sent while none did (a sequence needs a new block once in block_size steps)."""

    def __init__(self, most: int, columns: int, device: torch.device) -> None:
        self._pinned = torch.zeros((most, columns), dtype=torch.int32, pin_memory=True)
        self.device = torch.zeros((most, columns), dtype=torch.int32, device=device)
        self.host = self._pinned.numpy()
        self._rows: list[tuple[BlockTable, int] | None] = [None] * most

    def update(self, tables: Sequence[BlockTable]) -> None:
        rows = columns = 0
        for row, table in enumerate(tables):
            held = self._rows[row]
            if held is None or held[0] is not table or held[1] != table.count:
                self._rows[row] = (table, table.count)
                self.host[row, : table.count] = table.ids[: table.count]
                rows, columns = row + 1, max(columns, table.count)
        if rows:
            self.device[:rows, :columns].copy_(self._pinned[:rows, :columns], non_blocking=True)


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
    layers = getattr(getattr(model, "model", None), "layers", ())
    if layers and isinstance(getattr(layers[0].mlp, "experts", None), Mxfp4Experts):
        fast = FusedGptOss(model, backend.keys, backend.values, backend.group_of, context_length)
        step: Step = fast.forward
    else:
        step = stock_step(model, backend)
    columns = [-(-(context_length + 1) // config.block_size) for _ in groups]
    steps = GpuSteps(step, backend, columns, config.max_running)
    steps.warm(config.prefill_chunk + config.max_running)
    steps.capture()
    return backend, steps
