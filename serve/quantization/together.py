"""Whether several models are held in memory at once, and what each one's cache may then take.

Arithmetic over what plans need and what was measured to be free; no torch. Called by loader.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.quantization.machine import Machine

# Beside its weights a model's engine holds its work and, on a CPU, linear layers a second time.
COPIES = {"cuda": 1.0, "cpu": 1.5}
# Of what all weights leave free, the caches get so much; the rest is for steps and for others.
CACHES_SHARE = {"cuda": 0.6, "cpu": 0.5}
LEAST_CACHE_BYTES = {"cuda": 2**30, "cpu": 2**27}


def cache_bytes(machine: Machine, others: Sequence[int], fixed: int | None = None) -> int | None:
    """Bytes of cache for each model when `others`, which need so many bytes each, are to be loaded
    beside the one whose weights are in memory already; None: they do not fit together. `fixed`: the
    cache's size is set and not to be chosen."""
    left = machine.free_bytes - sum(_held(machine, needed) for needed in others)
    each = int(left * CACHES_SHARE[machine.device] / (len(others) + 1))
    least = LEAST_CACHE_BYTES[machine.device] if fixed is None else fixed
    if each < least:
        return None
    return each if fixed is None else fixed


def has_room(machine: Machine, needed: int, cache: int) -> bool:
    """Whether one more model fits into what is free now."""
    return _held(machine, needed) + cache <= machine.free_bytes


def _held(machine: Machine, needed: int) -> int:
    return int(needed * COPIES[machine.device])
