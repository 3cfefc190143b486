"""One decode step's attention on a CPU as one compiled function: turn, write, attend.

torch's attention costs 50 us a call on one thread and 170 on two, whatever it computes, and a step
of 32 sequences over 30 layers makes a thousand calls. This is one call a layer, compiled by Numba
for the model's head counts: rotary embedding, the cache write, and the softmax over the keys where
they lie. It runs on the thread that calls it and lets go of the interpreter's lock. Knows arrays
only; called by decoder.py.
"""

# Numba's functions are compiled from their arguments' types at run time.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import float32, int32

Attend = Callable[..., None]
_EXP2 = (0.693147182, 0.240226462, 0.0555041, 0.00961813, 0.00133336, 0.000154035)
_TYPES = (
    "void(f4[:,:,::1],f4[:,::1],f4[:,::1],f4[:,:,:,::1],i8[::1],i8[::1],i8[::1],i8[::1],f4,"
    "f4[:,:,::1],f4[:,::1],i4[:,::1])"
)


def compile_attention(heads: int, kv_heads: int, dim: int) -> Attend:
    """attend(packed, cos, sin, store, slots, first, starts, lengths, scale, out, scores, powers).

    `packed` [T, heads + 2 kv heads, dim] is queries, keys, values of one new token each, turned in
    place by `cos` and `sin` [T, dim]; `store` [slots, 2, kv heads, dim] is a layer's cache; `out`
    [T, heads, dim]. Token t is written to `slots[t]` and sees the `lengths[r]` slots from
    `starts[r]` on for r from `first[t]` to `first[t + 1]`. `scores` float32 and `powers` int32,
    [heads, most keys], are scratch. All float32. Compiling takes some seconds."""
    write = _writing(heads, kv_heads, dim)
    score = _scoring(kv_heads, heads // kv_heads, dim)
    soften = _softening()
    gather = _gathering(kv_heads, heads // kv_heads, dim)
    log2e = float32(1.4426950408889634)

    def attend(packed, cos, sin, store, slots, first, starts, lengths, scale, out, scores, powers):
        write(packed, cos, sin, store, slots)
        for t in range(packed.shape[0]):
            begins, sizes = starts[first[t] : first[t + 1]], lengths[first[t] : first[t + 1]]
            count = score(packed[t], store, begins, sizes, scores)
            for h in range(heads):
                soften(scores[h], powers[h], count, scale * log2e)
            gather(store, begins, sizes, scores, out[t])

    compiled: Attend = numba.njit(_TYPES, nogil=True, fastmath=True, error_model="numpy")(attend)
    return compiled


def _compiled(function: Any) -> Any:
    return numba.njit(nogil=True, fastmath=True, error_model="numpy")(function)


def _writing(heads: int, kv_heads: int, dim: int) -> Any:
    half = dim // 2

    def write(packed, cos, sin, store, slots):
        for t in range(packed.shape[0]):
            for h in range(heads + kv_heads):
                row = packed[t, h]
                for d in range(half):
                    low, high = row[d], row[d + half]
                    row[d] = low * cos[t, d] - high * sin[t, d]
                    row[d + half] = high * cos[t, d + half] + low * sin[t, d + half]
            for h in range(kv_heads):
                for d in range(dim):
                    store[slots[t], 0, h, d] = packed[t, heads + h, d]
                    store[slots[t], 1, h, d] = packed[t, heads + kv_heads + h, d]

    return _compiled(write)


def _scoring(kv_heads: int, group: int, dim: int) -> Any:
    zero = float32(0.0)

    def score(query, store, starts, lengths, scores):
        count = 0
        for r in range(starts.shape[0]):
            for slot in range(starts[r], starts[r] + lengths[r]):
                key = store[slot, 0]
                for h in range(kv_heads):
                    for g in range(group):
                        total = zero
                        for d in range(dim):
                            total += query[h * group + g, d] * key[h, d]
                        scores[h * group + g, count] = total
                count += 1
        return count

    return _compiled(score)


def _softening() -> Any:
    """exp2 of what is at most 0: the whole part goes to the exponent's bits, the rest through a
    polynomial, so that the loops hold eight numbers at a time."""
    c1, c2, c3, c4, c5, c6 = (float32(c) for c in _EXP2)
    one, zero, lowest = float32(1.0), float32(0.0), float32(-126.0)
    bias, shift = int32(127), int32(23)

    def soften(row, powers, count, scale):
        top = row[0]
        for j in range(count):
            top = max(top, row[j])
        for j in range(count):
            x = max((row[j] - top) * scale, lowest)
            whole = np.floor(x)
            y = x - whole
            row[j] = one + y * (c1 + y * (c2 + y * (c3 + y * (c4 + y * (c5 + y * c6)))))
            powers[j] = (int32(whole) + bias) << shift
        factors = powers.view(np.float32)
        total = zero
        for j in range(count):
            row[j] *= factors[j]
            total += row[j]
        share = one / total
        for j in range(count):
            row[j] *= share

    return _compiled(soften)


def _gathering(kv_heads: int, group: int, dim: int) -> Any:
    zero = float32(0.0)

    def gather(store, starts, lengths, scores, out):
        out[:] = zero
        count = 0
        for r in range(starts.shape[0]):
            for slot in range(starts[r], starts[r] + lengths[r]):
                value = store[slot, 1]
                for h in range(kv_heads):
                    for g in range(group):
                        weight = scores[h * group + g, count]
                        for d in range(dim):
                            out[h * group + g, d] += weight * value[h, d]
                count += 1

    return _compiled(gather)
