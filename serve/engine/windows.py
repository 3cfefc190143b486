"""A vision tower's attention over many short stretches at once.

Towers of Qwen's kind cut a picture into windows, some sixty of 64 patches; the stock forward takes
them one by one, thousands of small launches a picture, unless an attention function accepts them
all, as flash attention's does. `attend_windows` does: as one batch, padded to the longest. It is
registered under a name that holds "flash", by which transformers knows functions that take
`cu_seq_lens_q`. Knows no models; seeing.py chooses the towers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "windows_flash"
_MOST_PADDING = 2
"""Batches that padding makes more than so many times as long are taken one by one."""


def register() -> None:
    """Make the function known to transformers; repeating it does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend_windows)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Nobody sees beyond its window."""


def attend_windows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Queries, keys and values [1, heads, T, dim] -> [1, T, heads, dim]. Window i is the rows from
    `cu_seq_lens_q[i]` to the next, at most `max_length_q` of them; all see all of their window."""
    rows, count, longest = query.shape[2], len(cu_seq_lens_q) - 1, int(max_length_q)
    given = [part[0] for part in (query, key, value)]
    if count * longest > _MOST_PADDING * rows:
        lengths = cu_seq_lens_q.diff().tolist()
        windows = zip(*(part.split(lengths, 1) for part in given), strict=True)
        made = torch.cat([_attend(q, k, v, scaling) for q, k, v in windows], 1)
        return made.transpose(0, 1)[None], None
    first, end = cu_seq_lens_q[:-1, None], cu_seq_lens_q[1:, None]
    places = first + torch.arange(longest, device=query.device)  # [count, longest]
    mask = None if count * longest == rows else (places < end)[:, None, None]
    places = places.clamp(max=rows - 1)
    q, k, v = (part[:, places].transpose(0, 1) for part in given)
    made = _attend(q, k, v, scaling, mask)
    every = torch.arange(rows, device=query.device)
    window = torch.searchsorted(cu_seq_lens_q, every.to(cu_seq_lens_q.dtype), right=True) - 1
    return made.transpose(1, 2)[window, every - cu_seq_lens_q[window]][None], None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None = None
) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
