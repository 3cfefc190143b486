"""Bytes of a checkpoint as they reach memory, told while transformers places its tensors.

transformers walks through the tensors under a progress bar of its own, and lets others make that
bar; ours counts instead of drawing. Called by folder.py, on the loading thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Arrived = Callable[[int], None]
BAR = "Loading weights"


@contextmanager
def told(sizes: Mapping[str, int], arrived: Arrived) -> Iterator[None]:
    """While open, `arrived` gets the stored bytes of each tensor that transformers has placed.
    `sizes`: the bytes of every tensor in the files, by its name there."""
    from transformers.utils.logging import set_tqdm_hook

    def hook(factory: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if named.get("desc") != BAR:
            return factory(*arguments, **named)
        items = list(arguments[0])
        return _passing(items, shares([name for name, _ in items], sizes), arrived)

    before = set_tqdm_hook(hook)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _passing(items: Sequence[Any], weights: Sequence[int], arrived: Arrived) -> Iterator[Any]:
    for item, weight in zip(items, weights, strict=True):
        yield item
        arrived(weight)


def shares(names: Sequence[str], sizes: Mapping[str, int]) -> list[int]:
    """Bytes of each named tensor; those that go by other names in the files (transformers renames
    and joins some) share evenly what the others leave."""
    left = sum(sizes.values()) - sum(sizes.get(name, 0) for name in names)
    unknown = sum(name not in sizes for name in names)
    each = left // unknown if unknown else 0
    return [sizes.get(name, each) for name in names]
