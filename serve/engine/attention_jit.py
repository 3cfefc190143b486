"""One row's attention, compiled: norm, turn, write; then the keys of one head of the cache.

torch's attention costs 50 us a call on one thread and 170 on two, whatever it computes, and a step
of 32 sequences over 30 layers makes a thousand calls. Here it is a function that Numba compiles for
the model's head counts into step_jit.py's loop: rotary embedding, the cache write, and the softmax
over the keys where they lie. Knows arrays only.
"""

# Numba's functions are compiled from their arguments' types at run time.
# mypy: disable-error-code="no-untyped-def,call-arg"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import float32, int32

from serve.engine.products_jit import float_of_bits

_EXP2 = (0.693147182, 0.240226462, 0.0555041, 0.00961813, 0.00133336, 0.000154035)
# Sums in any order, but numbers that are not finite stay what they are.
RELAXED = frozenset({"reassoc", "contract", "arcp", "nsz"})


def relaxed(function: Any) -> Any:
    return numba.njit(nogil=True, fastmath=set(RELAXED), error_model="numpy")(function)


def exponential() -> Any:
    """exp2(x), 0 below -126: the whole part goes to the exponent's bits, the rest through a
    polynomial, so that loops hold many numbers at a time."""
    c1, c2, c3, c4, c5, c6 = (float32(c) for c in _EXP2)
    one, lowest, highest = float32(1.0), float32(-126.0), float32(127.0)
    bias, shift = int32(127), int32(23)

    def exp2(x):
        x = min(max(x, lowest), highest)
        whole = np.floor(x)
        y = x - whole
        part = one + y * (c1 + y * (c2 + y * (c3 + y * (c4 + y * (c5 + y * c6)))))
        return part * float_of_bits((int32(whole) + bias) << shift)

    return relaxed(exp2)


def compile_placing(heads: int, kv_heads: int, dim: int, has_norms: bool) -> Any:
    """place(row, packed, cos, sin, store, slots, norms, epsilon): one row's queries and keys are
    turned in place and its keys and values written to the cache.

    `packed` [T, heads + 2 kv heads, dim] is queries, keys, values of one token each, turned by
    `cos` and `sin` [T, dim] after RMSNorm with `norms` [2, dim], queries' and keys', where the
    model has them. `store` [slots, 2, kv heads, dim] is a layer's cache, `slots[row]` the place."""
    turn, norm = _turning(dim), _norming(dim)

    def place(row, packed, cos, sin, store, slots, norms, epsilon):
        token, written = packed[row], store[slots[row]]
        for h in range(heads + kv_heads):
            if has_norms:
                norm(token[h], norms[0 if h < heads else 1], epsilon)
            turn(token[h], cos[row], sin[row])
        for h in range(kv_heads):
            for d in range(dim):
                written[0, h, d] = token[heads + h, d]
                written[1, h, d] = token[heads + kv_heads + h, d]

    return relaxed(place)


def compile_attention(heads: int, kv_heads: int, dim: int) -> Any:
    """attend(row, begin, end, packed, store, first, starts, lengths, scale, scores, out): what one
    row's queries see through the cached heads `begin` to `end`, to `out` [T, heads, dim].

    Row t sees the `lengths[r]` slots of `store` from `starts[r]` on for r from `first[t]` to
    `first[t + 1]`. `scores` [heads, most keys] is scratch."""
    group = heads // kv_heads
    score, soften, gather = _scoring(group, dim), _softening(), _gathering(group, dim)
    log2e = float32(1.4426950408889634)

    def attend(row, begin, end, packed, store, first, starts, lengths, scale, scores, out):
        begins = starts[first[row] : first[row + 1]]
        sizes = lengths[first[row] : first[row + 1]]
        count = score(packed[row], store, begin, end, begins, sizes, scores)
        for h in range(begin * group, end * group):
            soften(scores[h], count, scale * log2e)
        gather(store, begin, end, begins, sizes, scores, out[row])

    return relaxed(attend)


def _norming(dim: int) -> Any:
    def norm(x, weight, epsilon):
        total = float32(0.0)
        for d in range(dim):
            total += x[d] * x[d]
        factor = float32(1.0) / np.sqrt(total / float32(dim) + epsilon)
        for d in range(dim):
            x[d] = x[d] * factor * weight[d]

    return relaxed(norm)


def _turning(dim: int) -> Any:
    half = dim // 2

    def turn(x, cos, sin):
        for d in range(half):
            low, high = x[d], x[d + half]
            x[d] = low * cos[d] - high * sin[d]
            x[d + half] = high * cos[d + half] + low * sin[d + half]

    return relaxed(turn)


def _scoring(group: int, dim: int) -> Any:
    zero = float32(0.0)

    def score(query, store, begin, end, starts, lengths, scores):
        count = 0
        for r in range(starts.shape[0]):
            for slot in range(starts[r], starts[r] + lengths[r]):
                for head in range(begin, end):
                    key = store[slot, 0, head]
                    for h in range(head * group, head * group + group):
                        total = zero
                        for d in range(dim):
                            total += query[h, d] * key[d]
                        scores[h, count] = total
                count += 1
        return count

    return relaxed(score)


def _softening() -> Any:
    exp2, zero, one = exponential(), float32(0.0), float32(1.0)

    def soften(row, count, scale):
        top = row[0]
        for j in range(count):
            top = max(top, row[j])
        total = zero
        for j in range(count):
            row[j] = exp2((row[j] - top) * scale)
            total += row[j]
        share = one / total
        for j in range(count):
            row[j] *= share

    return relaxed(soften)


def _gathering(group: int, dim: int) -> Any:
    zero = float32(0.0)

    def gather(store, begin, end, starts, lengths, scores, out):
        out[begin * group : end * group] = zero
        count = 0
        for r in range(starts.shape[0]):
            for slot in range(starts[r], starts[r] + lengths[r]):
                for head in range(begin, end):
                    value = store[slot, 1, head]
                    for h in range(head * group, head * group + group):
                        weight = scores[h, count]
                        for d in range(dim):
                            out[h, d] += weight * value[d]
                count += 1

    return relaxed(gather)
