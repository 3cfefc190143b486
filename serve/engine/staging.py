"""What a captured step reads, on its way to the device: small inputs in one piece, block tables.

Both are sent from pinned memory while the host goes on, so each has two places, 0 and 1: a step is
prepared in one while the step before may still be read from the other. Whoever uses a place again
waits first until its last step is done. Made and driven by gpu.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.engine.cache import BlockTable


@dataclass(frozen=True, slots=True)
class HostInputs:
    """One place: `numbers` int64 [3 + groups, most] (ids, positions, sources, then slots),
    `lengths` int32 [most], `draws` float32 [2, most]."""

    numbers: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    draws: npt.NDArray[np.float32]

    def pad(self, start: int) -> None:
        """From row `start` on: nothing stored, no keys seen. No sources, and every row greedy."""
        self.numbers[:2, start:] = 0
        self.numbers[2] = -1
        self.numbers[3:, start:] = -1
        self.lengths[start:] = 0
        self.draws[:] = 0


class StagedInputs:
    """What changes with every step: for each place one piece of host memory, and one copy on the
    device, whose parts are named as HostInputs' are."""

    def __init__(self, most: int, groups: int, device: torch.device) -> None:
        self._cuts = ((3 + groups) * most * 8, most * 4, most * 8)
        self._shape = (3 + groups, most)
        is_cuda = device.type == "cuda"
        size = -(-sum(self._cuts) // 16) * 16  # each place begins where any number may
        self._pieces = torch.zeros((2, size), dtype=torch.uint8, pin_memory=is_cuda)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.device_numbers, self.device_lengths, self.device_draws = self._views(self._device)
        self.host = tuple(
            HostInputs(*(view.numpy() for view in self._views(piece))) for piece in self._pieces
        )

    def _views(self, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers, lengths, draws = held[: sum(self._cuts)].split(self._cuts)
        return (
            numbers.view(torch.int64).view(self._shape),
            lengths.view(torch.int32),
            draws.view(torch.float32).view(2, -1),
        )

    def push(self, place: int) -> None:
        self._device.copy_(self._pieces[place], non_blocking=True)


class StagedTables:
    """One group's block tables, row by row, int32 [most, columns] on the device and (`host`) here.
    Only rows that changed are sent, in one piece; nothing is while none did (a sequence needs a new
    block once in block_size steps)."""

    def __init__(self, most: int, columns: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.device = torch.zeros((most, columns), dtype=torch.int32, device=device)
        self.host = np.zeros((most, columns), np.int32)
        self._pieces = torch.zeros((2, most * columns), dtype=torch.int32, pin_memory=is_cuda)
        self._changed: list[tuple[int, Tensor] | None] = [None, None]  # first row, and its rows
        self._rows: list[tuple[BlockTable, int] | None] = [None] * most

    def update(self, place: int, tables: Sequence[BlockTable]) -> None:
        """Row i is to be tables[i]."""
        changed, columns = [], 0
        for row, table in enumerate(tables):
            held = self._rows[row]
            if held is None or held[0] is not table or held[1] != table.count:
                self._rows[row] = (table, table.count)
                self.host[row, : table.count] = table.ids[: table.count]
                changed.append(row)
                columns = max(columns, table.count)
        self._changed[place] = None
        if changed:
            first, end = changed[0], changed[-1] + 1
            piece = self._pieces[place, : (end - first) * columns].view(end - first, columns)
            piece.numpy()[...] = self.host[first:end, :columns]
            self._changed[place] = (first, piece)

    def push(self, place: int) -> None:
        changed = self._changed[place]
        if changed is not None:
            first, piece = changed
            rows, columns = piece.shape
            self.device[first : first + rows, :columns].copy_(piece, non_blocking=True)
