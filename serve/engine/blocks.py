"""Matrices as 4 or 8-bit blocks, in the order in which products_jit.py reads them.

A decode step reads every weight for a few rows, so its time is the weights' bytes. Weights that
came from a GGUF file's Q4_0, Q4_1 or Q8_0 blocks are found again exactly from their values; others
are rounded to 8 bits. Knows arrays only; called by decoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 32
TILE = 16  # outputs side by side in one vector
LARGEST = 60_000.0  # what scales and offsets, kept as fp16, can hold
_ALIGNED = 64
_SAMPLED = 32

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [out, in] as w = scale level + offset, one scale and offset for 32 neighbours.
    `levels` uint8 [out, in / 32, 32]; `scales` and `offsets` fp16 [out, in / 32]. `is_exact`: it is
    the matrix, not a rounding of it."""

    bits: int
    levels: Bytes
    scales: Halves
    offsets: Halves
    is_exact: bool


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix for products_jit.py: `data` [tiles of 16 outputs, in / 32, bytes of a block], each
    block 64 * bits bytes of levels, then 16 scales and 16 offsets in fp16. Levels lie as 16 outputs
    by 4 neighbouring inputs, the next four inputs behind them or, in 4 bits, in the upper half of
    the same bytes. Outputs beyond the matrix are zero."""

    bits: int
    data: Bytes


def blocks(weight: Floats, least_bits: int = 4) -> Blocks:
    """The fewest bits, at least `least_bits`, that hold the matrix exactly, else 8. Q4_1 and Q4_0
    as in GGUF: 16 levels from the smallest value to the largest, or 16 multiples of an eighth of
    the largest magnitude; Q8_0: multiples of a 127th of it."""
    cells = weight.reshape(weight.shape[0], -1, BLOCK)
    for form in (_q4_1, _q4_0) if least_bits <= 4 else ():
        # Most that are not of this form show it in a few rows.
        if form(cells[:_SAMPLED]).is_exact and (made := form(cells)).is_exact:
            return made
    return _rounded(cells, np.maximum(-cells.min(-1), cells.max(-1)) / 127, None, 8)


def _q4_1(cells: Floats) -> Blocks:
    lowest = cells.min(-1)
    return _rounded(cells, (cells.max(-1) - lowest) / 15, lowest, 4)


def _q4_0(cells: Floats) -> Blocks:
    lowest, highest = cells.min(-1), cells.max(-1)
    eighths = np.where(-lowest > highest, -lowest, -highest) / 8
    return _rounded(cells, eighths, -8 * eighths, 4)


def _rounded(cells: Floats, scales: Floats, offsets: Floats | None, bits: int) -> Blocks:
    """Without offsets levels lie around 128."""
    halves = scales.astype(np.float16)
    halves[halves == 0] = 1
    scales = halves.astype(np.float32)
    middle = -128 * scales if offsets is None else offsets
    shifts = middle.astype(np.float16)
    wide = shifts.astype(np.float32)[..., None]
    inexact = (cells - wide) / scales[..., None]
    levels = np.rint(inexact)
    most = 2**bits - 1
    inside = levels.min() >= 0 and levels.max() <= most
    inexact -= levels
    is_exact = bool(inside and max(inexact.max(), -inexact.min()) <= 1e-3)
    np.clip(levels, 0, most, out=levels)
    return Blocks(bits, levels.astype(np.uint8), halves, shifts, is_exact)


def packed(found: Blocks) -> Packed:
    out, count = found.scales.shape
    tiles = -(-out // TILE)
    data = _aligned((tiles, count, 64 * found.bits + 64))
    levels = np.zeros((tiles * TILE, count, BLOCK), np.uint8)
    levels[:out] = found.levels
    quads = levels.reshape(tiles, TILE, count, 8, 4).transpose(0, 2, 3, 1, 4)
    if found.bits == 4:
        quads = quads[:, :, 0::2] | (quads[:, :, 1::2] << 4)
    data[:, :, : 64 * found.bits] = quads.reshape(tiles, count, -1)
    numbers = data[:, :, 64 * found.bits :].view(np.float16)
    for place, values in enumerate((found.scales, found.offsets)):
        padded = np.zeros((tiles * TILE, count), np.float16)
        padded[:out] = values
        numbers[:, :, TILE * place : TILE * (place + 1)] = padded.reshape(
            tiles, TILE, count
        ).transpose(0, 2, 1)
    return Packed(found.bits, data)


def _aligned(shape: tuple[int, ...]) -> Bytes:
    room = np.empty(int(np.prod(shape)) + _ALIGNED, np.uint8)
    start = -room.ctypes.data % _ALIGNED
    return room[start : start + int(np.prod(shape))].reshape(shape)
