"""The engine's tunables in one place. Made by app.py from the settings; read by the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

CPU_CHUNK = 128
GPU_CHUNK = 1024
ROOMY_CHUNK = 2048
RUNNING = 64
ROOMY_RUNNING = 128
ROOMY_GB = 8.0
"""A GPU with so much free beside the weights takes larger steps: their largest needs about 1.5 GiB
for a vocabulary of 200,000, which a card of 16 GB needs for its cache."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Tunables. What is 0 or None is chosen for the device.

    `prefill_chunk` is prompt tokens a step: the longest that running answers are held up.
    `max_waiting` and `max_waiting_tokens` bound the queue, `queue_timeout` (seconds, None: for
    ever) a place in it. `kv_cache_gb` None sizes the cache from free memory. `packs_weights` lets a
    CPU hold linear layers a second time as fp16; `fast_layers` off runs stock layers only.
    `runs_ahead`: a GPU computes its next step while the host reads the last one's ids.
    `dense_bits` 8 rounds gpt-oss's attention and vocabulary weights on a GPU (kernels/w8.py).
    """

    max_running: int = 0
    prefill_chunk: int = 0
    block_size: int = 32
    kv_cache_gb: float | None = None
    max_waiting: int = 256
    max_waiting_tokens: int = 1_000_000
    threads: int | None = None
    packs_weights: bool = False
    fast_layers: bool = True
    runs_ahead: bool = True
    dense_bits: int = 16
    queue_timeout: float | None = 300.0

    def for_device(self, device_type: str, free_gb: float = 0.0) -> EngineConfig:
        """With what was left to the device: a CPU computes some hundred prompt tokens a second, a
        GPU tens of thousands; `free_gb` is its free memory beside the weights."""
        is_roomy = device_type != "cpu" and free_gb >= ROOMY_GB
        chunk = CPU_CHUNK if device_type == "cpu" else ROOMY_CHUNK if is_roomy else GPU_CHUNK
        running = ROOMY_RUNNING if is_roomy else RUNNING
        return replace(
            self,
            prefill_chunk=self.prefill_chunk or chunk,
            max_running=self.max_running or running,
        )
