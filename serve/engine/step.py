"""What a compiled step reads and writes: the model's shape and weights, a step's arrays.

Numba compiles step_jit.py for exactly these tuples of arrays. Knows no model; filled by decoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serve.engine.blocks import BLOCK, TILE, Floats

PHASES = 10  # of a layer
LAST_PHASES = 2
COUNTER = 128  # bytes of a phase's counters, pieces taken and pieces done: two cache lines
ROWS = 8  # at most so many of a product's rows at a time

Places = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    width: int
    hidden: int
    vocabulary: int
    has_head_norms: bool

    @property
    def joined(self) -> int:
        """Width of queries, keys and values side by side."""
        return (self.heads + 2 * self.kv_heads) * self.dim


class Weights(NamedTuple):
    """`matrices` has (address, bits, outputs, blocks of a row, where its biases begin or -1,
    whether it adds to what is there) of four products a layer, then the head's. `biases` [layers,
    outputs of all four], or no column where no product has one. `norms` [2 layers + 1, width],
    `head_norms` [layers, 2, dim]."""

    matrices: Places
    biases: Floats
    norms: Floats
    head_norms: Floats
    epsilon: np.float32
    head_epsilon: np.float32
    scale: np.float32


class Step(NamedTuple):
    """What one step reads, writes and needs room for. `every` counts its rows; `stores` has (group,
    address, slots) of each layer's cache; `slots`, `first`, `starts` and `lengths` are those of
    attention_jit.py for each group; `counters` are zero."""

    every: Places
    hidden: Floats
    cos: Floats
    sin: Floats
    drawn: Places
    terms: int
    threads: int
    stores: Places
    slots: Places
    first: Places
    starts: Places
    lengths: Places
    packed: Floats
    split: Floats
    seen: Floats
    seen_heads: Floats
    gated: Floats
    logits: Floats
    inputs: npt.NDArray[np.int8]
    scales: Floats
    cells: Floats
    tiles: Floats
    scores: Floats
    counters: Bytes


def new_counters(layers: int) -> Bytes:
    return np.zeros((layers * PHASES + LAST_PHASES) * COUNTER, np.uint8)


def new_step(
    shape: Shape, threads: int, *, rows: int = 0, drawn: int = 0, terms: int = 1, longest: int = 0
) -> Step:
    """The arrays for `rows` rows that see up to `longest` keys; those that a step reads are empty,
    and so are its counters."""
    attended = shape.heads * shape.dim
    widest = max(shape.width, attended, shape.hidden)
    lines = terms * max(rows, drawn)
    packed, seen = _floats(rows, shape.joined), _floats(rows, attended)
    places = np.empty((1, 0), np.int64)
    return Step(
        every=np.arange(rows),
        hidden=_floats(rows, shape.width),
        cos=_floats(rows, shape.dim),
        sin=_floats(rows, shape.dim),
        drawn=places[0],
        terms=terms,
        threads=threads,
        stores=np.empty((0, 3), np.int64),
        slots=places,
        first=places,
        starts=places[0],
        lengths=places[0],
        packed=packed,
        split=packed.reshape(rows, shape.heads + 2 * shape.kv_heads, shape.dim),
        seen=seen,
        seen_heads=seen.reshape(rows, shape.heads, shape.dim),
        gated=_floats(rows, 2 * shape.hidden),
        logits=_floats(drawn, -(-shape.vocabulary // TILE) * TILE),
        inputs=np.empty(lines * widest, np.int8),
        scales=_floats(lines * widest // BLOCK * 2),
        cells=_floats(threads, BLOCK),
        tiles=_floats(threads, ROWS, TILE),
        scores=_floats(threads, shape.heads, longest),
        counters=new_counters(0),
    )


def no_weights(shape: Shape) -> Weights:
    """Of the right types, for a model without layers."""
    return Weights(
        matrices=np.zeros((1, 6), np.int64),
        biases=_floats(1, 0),
        norms=np.ones((1, shape.width), np.float32),
        head_norms=_floats(1, 2, shape.dim if shape.has_head_norms else 0),
        epsilon=np.float32(1),
        head_epsilon=np.float32(1),
        scale=np.float32(1),
    )


def _floats(*shape: int) -> Floats:
    return np.empty(shape, np.float32)
