"""GPU steps, as far as a CPU can tell: the numbers they draw by, and which rows they may draw.
bench/gpu/gpt_oss.py checks whole steps, graphs and the engine on a GPU."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from serve.engine import gpu, sampling
from serve.engine.config import EngineConfig
from serve.engine.kernels.gpt_oss import Batch
from serve.values import Sampling


def test_noise_in_numpy_is_the_samplers_noise() -> None:
    seeds = [0, 1, 2**64 - 1, 0x123456789ABCDEF0, 77]
    positions = [0, 5, 2**31, 1, 1023]
    found = gpu.uniforms(seeds, positions).tolist()
    assert found == [sampling.uniform(s, p) for s, p in zip(seeds, positions, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.1}, {"logprobs": 0}, {"min_tokens": 2},
        {"logit_bias": ((1, 2.0),)}, {"frequency_penalty": 0.1}, {"presence_penalty": 0.1},
        {"repetition_penalty": 1.1},
    ],
)  # fmt: skip
def test_whatever_shapes_a_distribution_beyond_temperature_is_not_plain(options: Any) -> None:
    assert gpu.plain_temperature(Sampling(**options)) is None


def test_a_plain_temperature_is_kept_and_a_tiny_one_is_greedy() -> None:
    assert gpu.plain_temperature(Sampling(temperature=0.7)) == 0.7
    assert gpu.plain_temperature(Sampling(temperature=1e-9)) == 0.0


def test_a_gpu_with_room_takes_larger_steps_and_what_is_set_stays() -> None:
    small, roomy = (EngineConfig().for_device("cuda", free) for free in (2.5, 60.0))
    assert (small.max_running, small.prefill_chunk) == (64, 1024)
    assert (roomy.max_running, roomy.prefill_chunk) == (128, 2048)
    assert EngineConfig().for_device("cpu").prefill_chunk == 128
    assert EngineConfig(max_running=3, prefill_chunk=7).for_device("cuda", 60.0).max_running == 3


@pytest.mark.parametrize("context", [8, 33, 4096])
def test_compiling_at_start_stays_within_a_short_context(
    context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    steps, seen = make_steps(context)
    steps.warm(150, context)
    assert {batch.ids.shape[0] for batch in seen} == {2, 5, 17, 33, 65, 129, 150}
    for batch in seen:
        assert batch.positions.max() < context and batch.longest <= context
        assert batch.lengths.sum() == batch.ids.shape[0] == batch.query_start[-1]
        assert all(batch.lengths.max() <= table.shape[1] * 4 for table in batch.tables)


def make_steps(context: int) -> tuple[gpu.GpuSteps, list[Batch]]:
    """Steps over two groups of layers in blocks of 4, whose batches are kept in the list."""
    seen: list[Batch] = []

    def step(batch: Batch, rows: torch.Tensor | None) -> torch.Tensor:
        seen.append(batch)
        return torch.zeros((1, 7))

    backend: Any = SimpleNamespace(device=torch.device("cpu"))
    return gpu.GpuSteps(step, backend, [-(-(context + 1) // 4)] * 2, 8), seen
