"""Drawing ids on the GPU, where only a temperature shapes the distribution.

The same rule as serve.engine.sampling: at temperature 0 the largest logit, else the id at which the
cumulative distribution passes one uniform number, which the caller makes from the request's seed.
Two launches, no synchronization: it can be part of a captured step. Knows no requests; gpu.py calls
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.engine.kernels import draws_kernels as kernels

_CHUNK = 4096


def draw(logits: Tensor, temperatures: Tensor, noise: Tensor, out: Tensor) -> None:
    """`logits` [rows, vocabulary], `temperatures` and `noise` (in [0, 1)) float32 [rows], `out`
    int64 [rows]: the id, or -1 where the row holds a NaN or +inf or nothing but -inf."""
    rows, vocabulary = logits.shape
    chunks = -(-vocabulary // _CHUNK)
    best, sums = torch.empty((2, rows, chunks), dtype=torch.float32, device=logits.device)
    ids, faults = torch.empty((2, rows, chunks), dtype=torch.int32, device=logits.device)
    kernels.survey_kernel[(rows, chunks)](
        logits, temperatures, best, sums, ids, faults, vocabulary, chunks, _CHUNK, num_warps=4
    )
    kernels.pick_kernel[(rows,)](
        logits, temperatures, noise, best, sums, ids, faults, out, vocabulary, chunks,
        1 << (chunks - 1).bit_length(), _CHUNK, num_warps=4,
    )  # fmt: skip


def follow(given: Tensor, sources: Tensor, drawn: Tensor, ids: Tensor) -> None:
    """All int64 [rows]: `ids` become `given`, but where `sources` is not negative the id that this
    row of `drawn` holds (0 for one that could not be drawn)."""
    kernels.follow_kernel[(ids.shape[0],)](given, sources, drawn, ids, num_warps=1)
