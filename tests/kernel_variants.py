"""Which compiled variants of the kernels the GPU's steps ask for: at start, and while serving.

Triton compiles a kernel again for every new combination of constants, of which pointers are
aligned to 16 bytes and of what integers are divisible by. A request that brings a new one waits
for the compiler, and so does everybody beside it. Run as a script (in a process that does not
interpret): prints the variants that serving asked for and starting had not compiled.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from serve.engine import gpu
from serve.engine.attention import Layout
from serve.engine.attention_gpu import KernelBackend
from serve.engine.cache import BlockTable, GroupSpec
from serve.engine.kernels import draws, experts
from serve.engine.kernels.gpt_oss import FusedGptOss
from serve.engine.sizing import LayerShape
from tests.engine_models import FAMILIES, tiny
from tests.kernel_recorder import Launch, recording

CPU = torch.device("cpu")
RUNNING, CHUNK, BLOCK, CONTEXT = 128, 2048, 32, 4096
WINDOWS = (None, 128)


def key(launch: Launch) -> tuple[Any, ...]:
    """What Triton caches a compiled kernel by, as far as our launches differ in it."""
    found: list[Any] = [launch.kernel.__name__, tuple(sorted(launch.options.items()))]
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            looks = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
            found.append((parameter.name, value.dtype, looks and value.data_ptr() % 16 == 0))
        elif parameter.is_constexpr:
            found.append((parameter.name, value))
        elif isinstance(value, int) and not parameter.do_not_specialize:
            found.append((parameter.name, "1" if value == 1 else value % 16 == 0))
    return tuple(found)


def steps_of(family: str) -> gpu.GpuSteps:
    model = tiny(family)
    config = model.config
    heads, dim = config.num_key_value_heads, getattr(config, "head_dim", 16)
    layers = config.num_hidden_layers
    groups = tuple(
        GroupSpec(window, tuple(range(i, layers, len(WINDOWS))), 64)
        for i, window in enumerate(WINDOWS)
    )
    shapes = [LayerShape(i, heads, dim, dim, WINDOWS[i % 2]) for i in range(layers)]
    backend = KernelBackend(shapes, groups, BLOCK, torch.float32, CPU)
    if family == "gpt_oss":
        for layer in model.model.layers:
            layer.mlp.experts = made_experts(config)
        args = (backend.keys, backend.values, backend.group_of, CONTEXT)
        step: gpu.Step = FusedGptOss(model, *args).forward
    else:
        from serve.engine.attention import NAME, register

        register()
        model.set_attn_implementation(NAME)
        step = gpu.stock_step(model, backend)
    return gpu.GpuSteps(step, backend, [CONTEXT // BLOCK + 1] * 2, RUNNING)


def made_experts(config: Any) -> experts.Mxfp4Experts:
    count, hidden, middle = config.num_local_experts, config.hidden_size, config.intermediate_size

    def held(rows: int, columns: int) -> experts.ExpertWeights:
        blocks = torch.zeros((count, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.full((count, rows, columns // 32), 120, dtype=torch.uint8)
        return experts.expert_weights(blocks, scales, torch.zeros(count, rows))

    return experts.Mxfp4Experts(held(2 * middle, hidden), held(hidden, middle), 1.702, 7.0)


def layouts(seed: int) -> Iterator[Layout]:
    """Steps as they come: any number of decodes beside prompts of any lengths."""
    draw = random.Random(seed)
    decodes = [*range(34), *(draw.randrange(34, RUNNING) for _ in range(12))]
    for count in decodes:
        prompts = [draw.choice([1, 2, 7, 33, 130, 700]) for _ in range(draw.choice([1, 1, 2, 5]))]
        counts = [1] * count + [n for n in prompts if n > 1][: RUNNING - count]
        if sum(counts):
            starts = [draw.randrange(1, CONTEXT - 800) for _ in counts]
            columns = CONTEXT // BLOCK + 1
            tables = [
                tuple(BlockTable(np.zeros(columns, np.int32), 0, -(-(s + c) // BLOCK))
                      for _ in WINDOWS)
                for s, c in zip(starts, counts, strict=True)
            ]  # fmt: skip
            yield Layout(starts, counts, tables, BLOCK, count)


def missing(family: str) -> set[tuple[Any, ...]]:
    steps = steps_of(family)
    with recording() as launches, torch.inference_mode():
        steps.warm(CHUNK + RUNNING, CONTEXT)
        for size in steps._sizes:
            steps._compute(size)
        known = {key(launch) for launch in launches}
        launches.clear()
        for layout in layouts(1):
            rows = list(layout.query_start[1:] - 1)
            for drawn in (rows, rows[: layout.decodes]):
                plain = np.zeros((2, len(drawn)), np.float32)
                if not steps.can_replay(layout):
                    steps.draw(layout, [0] * layout.total, drawn, plain)
        return {key(launch) for launch in launches} - known


def main() -> None:
    with (
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(experts, "shared_bytes", lambda x: 227 * 1024),
        mock.patch.object(draws, "_CHUNK", 7),  # 46 stretches of a row, as odd as gpt-oss's 50
    ):
        for family in sys.argv[1:] or FAMILIES:
            for variant in sorted(map(str, missing(family))):
                print(family, variant)


if __name__ == "__main__":
    main()
