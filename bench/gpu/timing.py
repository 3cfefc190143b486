"""Timing on a GPU: replays of a captured graph over rotating inputs, and the copy limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_microseconds(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Median time of one call, launched in turn inside one CUDA graph. Give several calls over
    different data, so that the cache holds none of it."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def copy_terabytes() -> float:
    """Bytes read and written by a large device copy, in TB/s."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    taken = graph_microseconds([lambda: target.copy_(source)] * 4)
    return 2 * source.nbytes / taken / 1e6


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """norm(found - exact) / norm(exact) in float64; NaN when anything is."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm())
