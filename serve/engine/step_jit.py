"""A step's rows through a Llama-like model: one compiled function that several threads call.

    for each layer:  norm | q, k, v | turn, write | attend | round | out
                     norm | gate, up | round | down

Work is taken, not dealt: each of these phases has some pieces, a thread takes the next free one
until none is left, and goes on when all are done. So every weight is read once a step, by one
thread; and a thread that comes late, or that the machine does not run, holds up nobody: the others
do its share, and it finds nothing left to take. Waiting is a short spin, then giving way to other
processes. Python's lock is not held.

A row's numbers do not depend on the rows beside it. With three `terms`, what the first rounding of
a product's inputs to 8 bits leaves is rounded again, twice, and rows are as good as in float32.
Knows arrays and addresses only; made and called by decoder.py.
"""

# Numba's functions are compiled from their arguments' types at run time.
# mypy: disable-error-code="no-untyped-def,call-arg,var-annotated,attr-defined"

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import float32, int8

from serve.engine.attention_jit import compile_attention, compile_placing, exponential, relaxed
from serve.engine.blocks import BLOCK, TILE
from serve.engine.products_jit import fetch, fetch_add, give_way, pause, pointer, tile_product
from serve.engine.step import COUNTER, PHASES, Shape, new_step, no_weights

_SPINS = 400  # about 20 us
_PIECES = 4  # of a product, for each thread


@cache
def compile_step(shape: Shape, instructions: str) -> Any:
    """step(weights, step, thread): to be called by up to `step.threads` threads at once, each with
    its own number; the logits are there when one of the calls has returned. Compiling takes some
    seconds; it is done when this returns."""
    multiply = _multiplying(_some_rows(instructions))
    round_block = _round_block()
    round_norm, round_rows = _norm_rounding(round_block), _row_rounding(round_block)
    round_gated = _gated_rounding(round_block, shape.hidden)
    place, attend = _placing(shape), _attending(shape)

    def step(weights, step, thread):
        rows, drawn = step.every.shape[0], step.drawn.shape[0]
        layers = step.stores.shape[0]
        at = np.int64(step.counters.ctypes.data)
        for layer in range(layers):
            m, n = 4 * layer, 2 * layer
            round_norm(at, step, step.every, weights, n, thread)
            multiply(at + COUNTER, step, rows, weights, m, step.packed, thread)
            place(at + 2 * COUNTER, step, weights, layer)
            attend(at + 3 * COUNTER, step, weights, layer, thread)
            round_rows(at + 4 * COUNTER, step, thread)
            multiply(at + 5 * COUNTER, step, rows, weights, m + 1, step.hidden, thread)
            round_norm(at + 6 * COUNTER, step, step.every, weights, n + 1, thread)
            multiply(at + 7 * COUNTER, step, rows, weights, m + 2, step.gated, thread)
            round_gated(at + 8 * COUNTER, step, thread)
            multiply(at + 9 * COUNTER, step, rows, weights, m + 3, step.hidden, thread)
            at += PHASES * COUNTER
        round_norm(at, step, step.drawn, weights, 2 * layers, thread)
        multiply(at + COUNTER, step, drawn, weights, 4 * layers, step.logits, thread)

    compiled = relaxed(step)
    compiled(no_weights(shape), new_step(shape, 1), 0)
    return compiled


@relaxed
def _done(counter):
    fetch_add(counter + COUNTER // 2)


@relaxed
def _wait(counter, pieces):
    """Until all pieces are done, whoever took them."""
    spins = 0
    while fetch(counter + COUNTER // 2) < pieces:
        spins += 1
        if spins < _SPINS:
            pause()
        else:
            give_way()


# Products are not relaxed: sums are to be made in the same order however many rows there are.
_strict = numba.njit(nogil=True, error_model="numpy")


def _some_rows(instructions: str) -> Any:
    four1, four4, four8 = (tile_product(instructions, 4, rows) for rows in (1, 4, 8))
    eight1, eight4, eight8 = (tile_product(instructions, 8, rows) for rows in (1, 4, 8))

    def some_rows(bits, weights, inputs, scales, out, blocks, rows):
        """As many of `rows` as one call can make: how many."""
        if bits == 4:
            if rows >= 8:
                four8(weights, inputs, scales, out, blocks)
                return 8
            if rows >= 4:
                four4(weights, inputs, scales, out, blocks)
                return 4
            four1(weights, inputs, scales, out, blocks)
            return 1
        if rows >= 8:
            eight8(weights, inputs, scales, out, blocks)
            return 8
        if rows >= 4:
            eight4(weights, inputs, scales, out, blocks)
            return 4
        eight1(weights, inputs, scales, out, blocks)
        return 1

    return _strict(some_rows)


def _multiplying(some_rows: Any) -> Any:
    @_strict
    def some_columns(t, step, rows, weights, matrix, out, tile):
        bits, outputs = weights.matrices[matrix, 1], weights.matrices[matrix, 2]
        blocks, terms = weights.matrices[matrix, 3], step.terms
        start, adds = weights.matrices[matrix, 4], weights.matrices[matrix, 5]
        biases = weights.biases
        address = weights.matrices[matrix, 0] + t * blocks * (64 * bits + 64)
        inputs, scales = step.inputs.ctypes.data, step.scales.ctypes.data
        low = TILE * t
        wide = min(TILE, outputs - low)
        has_bias = start >= 0 and biases.shape[1] > 0
        r = 0
        while r < rows * terms:
            levels, pairs = inputs + r * blocks * BLOCK, scales + r * blocks * 8
            made = some_rows(
                bits, address, levels, pairs, tile.ctypes.data, blocks, rows * terms - r
            )
            for i in range(made):
                row, term = (r + i) // terms, (r + i) % terms
                for j in range(wide):
                    before = out[row, low + j] if adds or term else float32(0.0)
                    out[row, low + j] = before + tile[i, j]
                if has_bias and term == 0:
                    for j in range(wide):
                        out[row, low + j] += biases[matrix // 4, start + low + j]
            r += made

    @_strict
    def multiply(counter, step, rows, weights, matrix, out, thread):
        """`out` = or += matrix times inputs, a row of which is `terms` rows there."""
        tiles = (weights.matrices[matrix, 2] + TILE - 1) // TILE
        pieces = min(tiles, _PIECES * step.threads if step.threads > 1 else 1)
        piece = fetch_add(counter)
        while piece < pieces:
            for t in range(piece * tiles // pieces, (piece + 1) * tiles // pieces):
                some_columns(t, step, rows, weights, matrix, out, step.tiles[thread])
            _done(counter)
            piece = fetch_add(counter)
        _wait(counter, pieces)

    return multiply


def _round_block() -> Any:
    half, zero, most, least = float32(0.5), float32(0.0), float32(127.0), float32(1e-30)

    def round_block(cell, step, row, block, blocks):
        for term in range(step.terms):
            largest, broken = zero, zero
            for j in range(BLOCK):
                largest = max(largest, abs(cell[j]))
                broken += cell[j] * zero  # what is not finite shall stay so
            inverse = most / largest if largest > least else zero
            scale = largest / most + broken
            at = (row * step.terms + term) * blocks + block
            levels = step.inputs[at * BLOCK : (at + 1) * BLOCK]
            total = zero
            for j in range(BLOCK):
                level = np.floor(cell[j] * inverse + half)
                levels[j] = int8(level)
                total += level
                cell[j] -= level * scale
            step.scales[2 * at] = scale
            step.scales[2 * at + 1] = scale * total

    return relaxed(round_block)


def _norm_rounding(round_block: Any) -> Any:
    zero, one = float32(0.0), float32(1.0)

    def round_norm(counter, step, which, weights, norm, thread):
        cell, weight = step.cells[thread], weights.norms[norm]
        width = step.hidden.shape[1]
        blocks = width // BLOCK
        row = fetch_add(counter)
        while row < which.shape[0]:
            x = step.hidden[which[row]]
            total = zero
            for d in range(width):
                total += x[d] * x[d]
            factor = one / np.sqrt(total / float32(width) + weights.epsilon)
            for block in range(blocks):
                for j in range(BLOCK):
                    cell[j] = x[block * BLOCK + j] * factor * weight[block * BLOCK + j]
                round_block(cell, step, row, block, blocks)
            _done(counter)
            row = fetch_add(counter)
        _wait(counter, which.shape[0])

    return relaxed(round_norm)


def _row_rounding(round_block: Any) -> Any:
    def round_rows(counter, step, thread):
        cell, rows = step.cells[thread], step.seen.shape[0]
        blocks = step.seen.shape[1] // BLOCK
        row = fetch_add(counter)
        while row < rows:
            for block in range(blocks):
                for j in range(BLOCK):
                    cell[j] = step.seen[row, block * BLOCK + j]
                round_block(cell, step, row, block, blocks)
            _done(counter)
            row = fetch_add(counter)
        _wait(counter, rows)

    return relaxed(round_rows)


def _gated_rounding(round_block: Any, hidden: int) -> Any:
    """Of SiLU(gate) * up."""
    exp2, one, log2e = exponential(), float32(1.0), float32(1.4426950408889634)

    def round_gated(counter, step, thread):
        cell, rows = step.cells[thread], step.gated.shape[0]
        blocks = hidden // BLOCK
        row = fetch_add(counter)
        while row < rows:
            for block in range(blocks):
                for j in range(BLOCK):
                    gate = step.gated[row, block * BLOCK + j]
                    up = step.gated[row, hidden + block * BLOCK + j]
                    cell[j] = gate * up / (one + exp2(-gate * log2e))
                round_block(cell, step, row, block, blocks)
            _done(counter)
            row = fetch_add(counter)
        _wait(counter, rows)

    return relaxed(round_gated)


def _placing(shape: Shape) -> Any:
    kv_heads, dim = shape.kv_heads, shape.dim
    place = compile_placing(shape.heads, kv_heads, dim, shape.has_head_norms)

    def place_all(counter, step, weights, layer):
        group, address, slots = step.stores[layer]
        store = numba.carray(pointer(address), (slots, 2, kv_heads, dim), np.float32)
        norms, rows = weights.head_norms[layer], step.every.shape[0]
        places = step.slots[group]
        row = fetch_add(counter)
        while row < rows:
            place(row, step.split, step.cos, step.sin, store, places, norms, weights.head_epsilon)
            _done(counter)
            row = fetch_add(counter)
        _wait(counter, rows)

    return relaxed(place_all)


def _attending(shape: Shape) -> Any:
    kv_heads, dim = shape.kv_heads, shape.dim
    attend = compile_attention(shape.heads, kv_heads, dim)

    def attend_all(counter, step, weights, layer, thread):
        group, address, slots = step.stores[layer]
        store = numba.carray(pointer(address), (slots, 2, kv_heads, dim), np.float32)
        scores, first = step.scores[thread], step.first[group]
        rows = step.every.shape[0]
        # A row's heads lie side by side in the cache: few rows are cut by heads, many are not.
        parts = 1 if rows >= 2 * step.threads else kv_heads
        piece = fetch_add(counter)
        while piece < rows * parts:
            row, part = piece // parts, piece % parts
            begin, end = part * kv_heads // parts, (part + 1) * kv_heads // parts
            attend(
                row, begin, end, step.split, store, first, step.starts, step.lengths, weights.scale,
                scores, step.seen_heads,
            )  # fmt: skip
            _done(counter)
            piece = fetch_add(counter)
        _wait(counter, rows * parts)

    return relaxed(attend_all)
