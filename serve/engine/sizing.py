"""How many blocks each kind of layer gets out of the memory there is. Plain arithmetic, no torch.

Called once at start by runner.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.engine.cache import GroupSpec


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One attention layer's cache geometry. `window` None is full attention."""

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None

    def bytes_per_token(self, itemsize: int) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * itemsize


@dataclass(frozen=True, slots=True)
class CacheSize:
    groups: tuple[GroupSpec, ...]
    context_length: int
    bytes: int


def size_cache(
    shapes: Sequence[LayerShape],
    budget_bytes: int,
    *,
    itemsize: int,
    block_size: int,
    context_length: int,
    max_running: int,
    chunk: int,
) -> CacheSize:
    """Blocks for every group within `budget_bytes`, for as many sequences of the context's length
    as fit, at most max_running (twice that for windows, so that beginnings stay known). When not
    even one fits, the context is shortened to what does."""
    kinds: dict[int | None, list[LayerShape]] = {}
    for shape in shapes:
        is_wide = shape.window is not None and shape.window >= context_length
        kinds.setdefault(None if is_wide else shape.window, []).append(shape)
    block_bytes = {
        window: block_size * sum(shape.bytes_per_token(itemsize) for shape in members)
        for window, members in kinds.items()
    }

    def blocks(window: int | None, tokens: int) -> int:
        whole = -(-(tokens + 1) // block_size)
        return whole if window is None else min(whole, -(-(window + chunk) // block_size) + 1)

    def cost(tokens: int) -> int:
        return sum(blocks(window, tokens) * size for window, size in block_bytes.items())

    while context_length > block_size and cost(context_length) > budget_bytes:
        context_length -= max(block_size, context_length // 16)
    context_length = max(context_length, block_size)
    # Beyond one full-length sequence, share what is left as sequences of a middling length would.
    typical = min(context_length, 2048)
    floor = {window: blocks(window, context_length) for window in kinds}
    left = max(0, budget_bytes - cost(context_length))
    per_sequence = sum(
        _held(window, typical, block_size) * size for window, size in block_bytes.items()
    )
    most = max_running * -(-context_length // typical) + max_running
    extra = min(left // per_sequence, most)
    groups = tuple(
        GroupSpec(
            window,
            tuple(shape.layer for shape in members),
            floor[window] + extra * _held(window, typical, block_size),
        )
        for window, members in kinds.items()
    )
    used = sum(group.blocks * block_bytes[group.window] for group in groups)
    return CacheSize(groups, context_length, used)


def _held(window: int | None, tokens: int, block_size: int) -> int:
    """Blocks a decoding sequence of `tokens` holds, a window twice: itself, and its prompt's."""
    whole = -(-tokens // block_size)
    return whole if window is None else min(whole, 2 * (-(-window // block_size) + 1))
