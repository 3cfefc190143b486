"""What this machine has for a model: the device, its free memory, what it computes in.

Asked once per loading. Called by loader.py; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """`free_bytes` is the memory of `device` that weights may take; `name` is for messages."""

    device: Literal["cuda", "cpu"]
    free_bytes: int
    name: str
    has_bf16: bool = True

    @property
    def memory_word(self) -> str:
        return "GPU memory" if self.device == "cuda" else "memory"


def this_machine() -> Machine:
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine("cuda", free, torch.cuda.get_device_name(), has_bf16)
    return Machine("cpu", free_memory(), "the CPU")


def can_hold_mxfp4(machine: Machine) -> bool:
    """Whether 4-bit expert layers can be computed: by torch on a CPU, by Triton on a GPU."""
    return machine.device == "cpu" or find_spec("triton") is not None


def has_gptqmodel(method: str) -> bool:
    """Whether gptqmodel is installed, with what transformers also wants for the method."""
    wanted = ("gptqmodel", "optimum") if method == "gptq" else ("gptqmodel",)
    return all(find_spec(name) is not None for name in wanted)


def free_memory(cgroups: Path = CGROUPS) -> int:
    """Bytes that a process may still take: the system's, or the container's when that is less."""
    import psutil

    return min(int(psutil.virtual_memory().available), *_container_rooms(cgroups), 1 << 60)


def _container_rooms(cgroups: Path) -> list[int]:
    """limit - used of this container (cgroup v2, then v1); page cache that can go counts free."""
    rooms = []
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            room = int((cgroups / limit).read_text()) - int((cgroups / used).read_text())
            lines = (cgroups / stat).read_text().splitlines()
        except (OSError, ValueError):
            continue  # no such controller, or "max": no limit
        counts = dict(line.split(maxsplit=1) for line in lines if " " in line)
        rooms.append(room + int(counts.get(cache, 0)))
    return rooms
