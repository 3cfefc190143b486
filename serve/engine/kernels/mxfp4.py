"""The MXFP4 number format, in torch: what the bytes of an MXFP4 checkpoint mean.

A weight matrix [rows, columns] is held as `blocks` uint8 [..., rows, columns / 32, 16] and `scales`
uint8 [..., rows, columns / 32]: 32 consecutive columns share one power of two, 2 ** (scale - 127)
(E8M0), and byte j holds columns 2j (low four bits) and 2j + 1 (high four bits), each sign, two
exponent bits and one mantissa bit (E2M1). Source: OCP Microscaling Formats 1.0, sections 5.2, 5.3.
Knows no model and no kernel; experts.py and the tests build on it.
"""

from __future__ import annotations

import torch

GROUP = 32
"""Columns that share a scale."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_EXPONENT = 2  # 6.0 = 1.5 * 2**2


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., rows, columns] in `dtype`, exact whenever the value can be held there.

    `blocks` [..., rows, groups, 16] and `scales` [..., rows, groups], both uint8.
    """
    signed = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))
    table = torch.tensor(signed, dtype=torch.float32, device=blocks.device)
    low = table[(blocks & 0x0F).int()]
    high = table[(blocks >> 4).int()]
    values = torch.stack((low, high), dim=-1).flatten(-2)
    exponent = (scales.int() - 127).unsqueeze(-1)
    return torch.ldexp(values, exponent).flatten(-2).to(dtype)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, scales) of a real [..., rows, columns]; columns must be a multiple of 32.

    The scale of a group is that of its largest magnitude, 2 ** (floor(log2 max) - 2); values round
    to the nearest E2M1 number, ties to the even mantissa, and what lies beyond 6 becomes 6
    (section 6.3 of the format's text).
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(f"the last axis must be a multiple of {GROUP}, not {weight.shape[-1]}")
    groups = weight.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    exponent = torch.frexp(largest).exponent - 1 - _LARGEST_EXPONENT
    exponent = torch.where(largest > 0, exponent, torch.zeros_like(exponent)).clamp(-127, 127)
    scaled = torch.ldexp(groups, -exponent.unsqueeze(-1))
    codes = _nearest_code(scaled.abs().contiguous()) | (torch.signbit(scaled).to(torch.uint8) << 3)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks.contiguous(), (exponent + 127).to(torch.uint8)


def _nearest_code(magnitude: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of `_MAGNITUDES`; a tie goes to the even index."""
    table = torch.tensor(_MAGNITUDES, device=magnitude.device)
    middles = (table[1:] + table[:-1]) / 2
    below = torch.bucketize(magnitude, middles, right=False)  # a tie counts as below
    above = torch.bucketize(magnitude, middles, right=True)
    return torch.where(below % 2 == 0, below, above).to(torch.uint8)
