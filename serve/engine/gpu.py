"""Steps on an NVIDIA GPU: our attention kernels, CUDA graphs of decode steps, ids drawn there.

`KernelBackend` is the attention backend for any stock model whose heads the kernels take.
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
from serve.engine.attention import Call, Layout, TorchBackend
from serve.engine.cache import GroupSpec
from serve.engine.config import EngineConfig
from serve.engine.kernels import attention, fused
from serve.engine.kernels.draws import draw
from serve.engine.kernels.experts import Mxfp4Experts
from serve.engine.kernels.gpt_oss import Batch, FusedGptOss, splits_for
from serve.engine.sampling import Draw
from serve.engine.sequence import Sequence as Choice
from serve.engine.sizing import LayerShape

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Batch sizes that graphs are captured for."""

# Logits [rows, vocabulary] of a batch's named rows (None: of all).
Step = Callable[[Batch, Tensor | None], Tensor]


def supports(shapes: Sequence[LayerShape], config: Any, device: torch.device) -> bool:
    """Whether the attention kernels take every layer: equal key and value heads of a power of two
    up to 256, and no soft cap on the scores."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (7, 5)
        and getattr(text, "attn_logit_softcapping", None) is None
        and all(s.key_dim == s.value_dim and s.key_dim in (16, 32, 64, 128, 256) for s in shapes)
    )


def plain_draws(choices: Sequence[Choice]) -> tuple[list[float], list[float]] | None:
    """Each row's temperature (0: greedy) and noise, or None when a row's distribution is shaped by
    anything else, which takes sampling.draw."""
    temperatures, noise = [], []
    for choice in choices:
        o = choice.request.generation.sampling
        is_shaped = o.top_p < 1 or o.top_k or o.min_p or o.logprobs is not None or o.logit_bias
        is_bound = choice.request.counts_draws or o.min_tokens or choice.matcher is not None
        if is_shaped or is_bound:
            return None
        is_greedy = o.temperature <= sampling.GREEDY_BELOW
        temperatures.append(0.0 if is_greedy else o.temperature)
        noise.append(sampling.uniform(choice.seed, choice.drawn))
    return temperatures, noise


class KernelBackend(TorchBackend):
    """Attention by our kernels. `batch` is what the layers read: `begin` makes it from a layout,
    GpuSteps puts its own there."""

    batch: Batch

    def begin(self, layout: Layout) -> None:
        self.batch = self.upload(layout, np.zeros(layout.total, np.int64))

    def upload(self, layout: Layout, ids: npt.NDArray[np.int64]) -> Batch:
        """A batch of its own tensors."""
        groups = range(len(self.windows))

        def put(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        return Batch(
            ids=put(ids),
            positions=put(layout.positions),
            slots=tuple(put(layout.slots(g)) for g in groups),
            tables=tuple(put(layout.block_tables(g)) for g in groups),
            lengths=put(layout.lengths),
            query_start=put(layout.query_start),
            decodes=layout.decodes,
            longest=max(layout.counts),
        )

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        slots = self.batch.slots[self.group_of[layer]]
        fused.store(key[0], value[0], slots, self.keys[layer], self.values[layer])

    def attend(self, layer: int, query: Tensor, call: Call) -> Tensor:
        group, batch = self.group_of[layer], self.batch
        q = query[0].transpose(0, 1).contiguous()
        out = torch.empty_like(q)
        rule = attention.Rule(call.scale, self.windows[group], call.sinks)
        keys, values, table = self.keys[layer], self.values[layer], batch.tables[group]
        n, (tokens, heads, dim) = batch.decodes, q.shape
        if n:
            splits = 1 if rule.window is not None else splits_for(n)
            room = attention.Room.create(n, heads, dim, splits, q.device) if splits > 1 else None
            attention.decode(
                q[:n], keys, values, table, batch.lengths[:n], rule, out[:n], splits, room
            )
        if n < tokens:
            attention.prefill(
                q, keys, values, table[n:], batch.query_start[n:], batch.lengths[n:], rule, out,
                batch.longest,
            )  # fmt: skip
        return out[None]


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
        self._numbers = _Mirror((2 + groups, most), torch.int64, self._device)
        self._lengths = _Mirror((most,), torch.int32, self._device)
        self._draws = _Mirror((2, most), torch.float32, self._device)
        self._tables = [_Mirror((most, width), torch.int32, self._device) for width in columns]
        self._one_each = torch.arange(most + 1, dtype=torch.int32, device=self._device)
        self._out = torch.empty(most, dtype=torch.int64, pin_memory=True)
        self._graphs: dict[int, _Graph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every size, the largest first so that the others fit in its memory."""
        began = time.monotonic()
        self._fill_padding(0, self._sizes[-1])
        for mirror in (self._numbers, self._lengths, self._draws, *self._tables):
            mirror.push()
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

    def can_replay(self, layout: Layout) -> bool:
        return layout.decodes == len(layout.counts) <= self._sizes[-1]

    def plain_draws(self, choices: Sequence[Choice]) -> tuple[list[float], list[float]] | None:
        """See plain_draws above."""
        return plain_draws(choices)

    def logits(self, layout: Layout, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
        """The logits of `rows`, on the device, to be used before the next step."""
        if self.can_replay(layout):
            logits, _ = self._replay(layout, ids, rows, ([0.0] * len(rows),) * 2)
            return logits[list(rows)]
        return self._mixed(layout, ids, rows)

    @torch.inference_mode()
    def draw(
        self,
        layout: Layout,
        ids: Sequence[int],
        rows: Sequence[int],
        draws: tuple[list[float], list[float]],
    ) -> list[Draw]:
        """The ids that `rows` draw by their temperatures and noise."""
        if self.can_replay(layout):
            _, drawn = self._replay(layout, ids, rows, draws)
            return _outcomes(drawn[list(rows)].tolist())
        logits = self._mixed(layout, ids, rows)
        if not rows:
            return []
        found = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        temperatures, noise = torch.tensor(draws, dtype=torch.float32, device=self._device)
        draw(logits, temperatures, noise, found)
        return _outcomes(found.tolist())

    @torch.inference_mode()
    def _replay(
        self,
        layout: Layout,
        ids: Sequence[int],
        rows: Sequence[int],
        draws: tuple[list[float], list[float]],
    ) -> tuple[Tensor, Tensor]:
        """One token each: logits [sequences, vocabulary] on the device (overwritten by the next
        step), and what every row drew, on the host; `draws` are those of `rows`."""
        count = len(ids)
        size = next(size for size in self._sizes if size >= count)
        numbers = self._numbers.host
        numbers[0, :count] = ids
        numbers[1, :count] = layout.rotary_starts
        for group in range(len(self._tables)):
            numbers[2 + group, :count] = layout.slots(group)
            table = layout.block_tables(group)
            self._tables[group].host[:count, : table.shape[1]] = table
            self._tables[group].push(size, table.shape[1])
        self._lengths.host[:count] = layout.lengths
        self._fill_padding(count, size)
        self._draws.host[:, list(rows)] = draws
        self._numbers.push()
        self._lengths.push()
        self._draws.push()
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
        temperatures, noise = self._draws.device[:, :size]
        draw(logits, temperatures, noise, drawn)
        return logits, drawn

    def _fill_padding(self, start: int, end: int) -> None:
        self._numbers.host[:2, start:end] = 0
        self._numbers.host[2:, start:end] = -1
        self._lengths.host[start:end] = 0
        self._draws.host[:, :end] = 0
        for table in self._tables:
            table.host[start:end] = 0

    def _batch(self, size: int) -> Batch:
        numbers = self._numbers.device
        return Batch(
            ids=numbers[0, :size],
            positions=numbers[1, :size],
            slots=tuple(numbers[2 + g, :size] for g in range(len(self._tables))),
            tables=tuple(table.device[:size] for table in self._tables),
            lengths=self._lengths.device[:size],
            query_start=self._one_each[: size + 1],
            decodes=size,
            longest=1,
        )


def _outcomes(ids: list[int]) -> list[Draw]:
    unsound = "The model computed numbers that are not finite."
    return [Draw(i) if i >= 0 else Draw(problem=unsound) for i in ids]


class _Mirror:
    """A host array in pinned memory and its copy on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._pinned = torch.zeros(shape, dtype=dtype, pin_memory=True)
        self.device = torch.zeros(shape, dtype=dtype, device=device)
        self.host = self._pinned.numpy()

    def push(self, rows: int | None = None, columns: int | None = None) -> None:
        """Send all, or the first rows and columns."""
        if rows is None:
            self.device.copy_(self._pinned, non_blocking=True)
        else:
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
    """The backend for `model`, and its steps with every graph captured. Ask `supports` first."""
    backend = KernelBackend(shapes, groups, config.block_size, dtype, device)
    layers = getattr(getattr(model, "model", None), "layers", ())
    if layers and isinstance(getattr(layers[0].mlp, "experts", None), Mxfp4Experts):
        fast = FusedGptOss(model, backend.keys, backend.values, backend.group_of, context_length)
        step: Step = fast.forward
    else:
        step = stock_step(model, backend)
    columns = [-(-(context_length + 1) // config.block_size) for _ in groups]
    steps = GpuSteps(step, backend, columns, config.max_running)
    steps.capture()
    return backend, steps
