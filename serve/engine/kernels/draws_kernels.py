"""Triton kernels that draw ids; draws.py launches them and says what they compute."""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


# fmt: off
# Where these begin goes by the number of rows, which is no reason to compile anew.
@triton.jit(
    do_not_specialize_on_alignment=[
        "temperatures_ptr", "best_ptr", "sums_ptr", "ids_ptr", "faults_ptr"
    ]
)
def survey_kernel(
    logits_ptr: tl.tensor, temperatures_ptr: tl.tensor, best_ptr: tl.tensor, sums_ptr: tl.tensor,
    ids_ptr: tl.tensor, faults_ptr: tl.tensor, V: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One stretch of one row: its largest logit and where, the sum of its odds, and how many of its
    numbers are not finite (NaN or +inf)."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    here = at < V
    x = tl.load(logits_ptr + row.to(tl.int64) * V + at, mask=here, other=float("-inf"))
    x = x.to(tl.float32)
    faulty = (x != x) | (x == float("inf"))
    tl.store(faults_ptr + row * CHUNKS + chunk, tl.sum(faulty.to(tl.int32), 0))
    x = tl.where(faulty, float("-inf"), x)
    best = tl.max(x, 0)
    temperature = tl.load(temperatures_ptr + row)
    cold = tl.where(temperature > 0, temperature, 1.0)
    odds = tl.exp((x - tl.where(best > float("-inf"), best, 0.0)) / cold)
    tl.store(best_ptr + row * CHUNKS + chunk, best)
    tl.store(sums_ptr + row * CHUNKS + chunk, tl.sum(odds, 0))
    tl.store(ids_ptr + row * CHUNKS + chunk, chunk * CHUNK + tl.argmax(x, 0))


@triton.jit(
    do_not_specialize_on_alignment=[
        "temperatures_ptr", "noise_ptr", "best_ptr", "sums_ptr", "ids_ptr", "faults_ptr"
    ]
)
def pick_kernel(
    logits_ptr: tl.tensor, temperatures_ptr: tl.tensor, noise_ptr: tl.tensor, best_ptr: tl.tensor,
    sums_ptr: tl.tensor, ids_ptr: tl.tensor, faults_ptr: tl.tensor, out_ptr: tl.tensor,
    V: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
) -> None:
    """A row's id: the stretch in which the cumulative odds pass the noise, then the place in it; at
    temperature 0 the largest. -1 when a number was not finite or nothing can be drawn."""
    row = tl.program_id(0)
    c = tl.arange(0, PADDED)
    mine = row * CHUNKS + c
    there = c < CHUNKS
    best = tl.load(best_ptr + mine, mask=there, other=float("-inf"))
    highest = tl.max(best, 0)
    faults = tl.sum(tl.load(faults_ptr + mine, mask=there, other=0), 0)
    temperature = tl.load(temperatures_ptr + row)
    if (faults > 0) | (highest == float("-inf")):
        tl.store(out_ptr + row, -1)
    elif temperature <= 0:
        tl.store(out_ptr + row, tl.load(ids_ptr + row * CHUNKS + tl.argmax(best, 0)).to(tl.int64))
    else:
        sums = tl.load(sums_ptr + mine, mask=there, other=0.0)
        share = tl.where(there, sums * tl.exp((best - highest) / temperature), 0.0)
        aim = tl.load(noise_ptr + row) * tl.sum(share, 0)
        chunk = tl.sum(((tl.cumsum(share, 0) <= aim) & there).to(tl.int32), 0)
        last = tl.max(tl.where(share > 0, c, 0), 0)
        chunk = tl.minimum(chunk, last)
        rest = aim - tl.sum(tl.where(c < chunk, share, 0.0), 0)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row.to(tl.int64) * V + at, mask=at < V, other=float("-inf"))
        odds = tl.exp((x.to(tl.float32) - highest) / temperature)
        place = tl.sum((tl.cumsum(odds, 0) <= rest).to(tl.int32), 0)
        final = tl.max(tl.where(odds > 0, at, 0), 0)
        tl.store(out_ptr + row, tl.minimum(chunk * CHUNK + place, final).to(tl.int64))


@triton.jit
def follow_kernel(
    given_ptr: tl.tensor, sources_ptr: tl.tensor, drawn_ptr: tl.tensor, ids_ptr: tl.tensor
) -> None:
    """A row's id: the one given, or where its source is not negative what that row drew before."""
    row = tl.program_id(0)
    token = tl.load(given_ptr + row)
    source = tl.load(sources_ptr + row)
    if source >= 0:
        token = tl.maximum(tl.load(drawn_ptr + source), 0)
    tl.store(ids_ptr + row, token)
