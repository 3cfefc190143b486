"""The attention backend for NVIDIA GPUs: our kernels under any stock model they can serve.

`supports` says whether they can; otherwise attention.TorchBackend serves. `batch` is what the
layers read in a step: `begin` makes it from a layout, gpu.py puts its own there. Knows no requests
and no graphs; made by gpu.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.engine.attention import Call, Layout, TorchBackend
from serve.engine.kernels import attention, fused
from serve.engine.kernels.gpt_oss import Batch, splits_for
from serve.engine.sizing import LayerShape


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
