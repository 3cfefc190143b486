"""Kernels that are launched before the one in front of them has ended.

"Programmatic dependent launch" of compute capability 9.0 and up (CUDA C++ programming guide): every
kernel of a decode step first lets the next one start, then waits for the one before, of which all
is done and visible from there on. What happens before the wait may only touch weights. A chain of
short kernels so saves the gaps between them, and weights are on their way while others compute.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


def starts_early(x: torch.Tensor) -> bool:
    """Whether launches on x's device may overlap so; to be passed on as `launch_pdl` too."""
    return x.is_cuda and _has_early_start(x.device)


@functools.cache
def _has_early_start(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_last(EARLY: tl.constexpr) -> None:
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch(pointers: tl.tensor) -> None:
    """Ask for the 128 bytes at each pointer to be brought into the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
