"""A tower's windows attended at once, against each of them alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from serve.engine import windows


@pytest.mark.parametrize(
    "lengths", [[4, 4, 4], [7], [4, 3, 4, 2], [1, 1, 5], [9, 1, 1, 1, 1, 1, 1, 1]]
)
def test_windows_at_once_give_what_each_gives_alone(lengths: list[int]) -> None:
    torch.manual_seed(1)
    parts = [torch.randn(1, 3, sum(lengths), 8) for _ in range(3)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    found, _ = windows.attend_windows(
        torch.nn.Module(), *parts, cu_seq_lens_q=bounds, max_length_q=max(lengths), scaling=0.3
    )
    alone = [
        scaled_dot_product_attention(*window, scale=0.3)
        for window in zip(*(part.split(lengths, 2) for part in parts), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone, 2).transpose(1, 2))
