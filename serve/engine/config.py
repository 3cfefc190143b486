"""The engine's tunables in one place. Made by app.py from the settings; read by the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

CPU_CHUNK = 128
GPU_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Tunables. What is 0 or None is chosen for the device.

    `prefill_chunk` is prompt tokens a step: the longest that running answers are held up.
    `max_waiting` and `max_waiting_tokens` bound the queue, `queue_timeout` (seconds, None: for
    ever) a place in it. `kv_cache_gb` None sizes the cache from free memory. `packs_weights` lets a
    CPU hold linear layers a second time as fp16; `fast_layers` off runs stock layers only.
    `runs_ahead`: a GPU computes its next step while the host reads the last one's ids.
    """

    max_running: int = 64
    prefill_chunk: int = 0
    block_size: int = 32
    kv_cache_gb: float | None = None
    max_waiting: int = 256
    max_waiting_tokens: int = 1_000_000
    threads: int | None = None
    packs_weights: bool = False
    fast_layers: bool = True
    runs_ahead: bool = True
    queue_timeout: float | None = 300.0

    def for_device(self, device_type: str) -> EngineConfig:
        """With a chunk for the device: a CPU computes some hundred prompt tokens a second, a GPU
        tens of thousands."""
        chunk = CPU_CHUNK if device_type == "cpu" else GPU_CHUNK
        return self if self.prefill_chunk else replace(self, prefill_chunk=chunk)
