"""The engine's tunables in one place. Made by app.py from the settings; read by the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Tunables. `prefill_chunk` is prompt tokens a step; `max_waiting*` bound the queue, `None` for
    `queue_timeout` waits for ever; `kv_cache_gb` None sizes the cache from free memory."""

    max_running: int = 64
    prefill_chunk: int = 1024
    block_size: int = 32
    kv_cache_gb: float | None = None
    max_waiting: int = 256
    max_waiting_tokens: int = 1_000_000
    threads: int | None = None
    packs_weights: bool = False
    fast_layers: bool = True
    queue_timeout: float | None = 300.0
