"""The engine's own rates on the made model, a step ahead and waiting, then over HTTP; and what
eight long sequences take in memory. Parts of gpt_oss.py."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from serve.engine.config import EngineConfig
from serve.engine.engine import PagedEngine, create_engine
from serve.engine.face import BlockingMailbox, Ended, GenerationRequest, Prompt, Tokens
from serve.values import Sampling

DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Served:
    """`rate`: output tokens a second from the first submit to the last end."""

    rate: float
    first_seconds: float
    ids: list[list[int]]


def rates(model: Any) -> None:
    """So many requests at once, 128 tokens in, 256 out, every count twice on other prompts."""
    config = EngineConfig(max_running=128, kv_cache_gb=8.0, prefill_chunk=2048)
    made = create_engine(model, eos_ids=[0], context_length=8192, device=DEVICE, config=config)
    serve(made, [8] * 8, 1.0, 0, "warm")
    for go in (1, 2):
        for streams in (64, 128, 1, 8, 32):
            rate = serve(made, [256] * streams, 1.0, random.randrange(10**6), str(go)).rate
            print(f"engine {streams:4} streams, go {go}: {rate:8.0f} tok/s", flush=True)
    made.close()


def engine(model: Any) -> None:
    """So many requests at once, 128 tokens in, 256 out: each count a step ahead and waiting, on the
    same prompts, whose ids must be the same. Then lengths that differ, greedy. Then over HTTP."""
    config = EngineConfig(max_running=128, kv_cache_gb=8.0, prefill_chunk=2048)
    begin = time.perf_counter()
    made = create_engine(model, eos_ids=[0], context_length=8192, device=DEVICE, config=config)
    print(f"engine ready in {time.perf_counter() - begin:.1f} s, graphs and compiling included")
    serve(made, [8] * 8, 1.0, 0, "warm")
    for streams in (64, 128, 1, 8, 32):
        compare(made, [256] * streams, 1.0)
    compare(made, [20 + 7 * i % 200 for i in range(100)], 0.0)
    from bench.gpu import over_http  # needs what the app needs, the rest does not

    over_http.measure(made, 64, rounds=2)
    made.close()


def compare(made: PagedEngine, limits: Sequence[int], temperature: float) -> None:
    seed = random.randrange(10**6)
    found = {}
    for name in ("ahead", "waiting"):
        made.runs_ahead = name == "ahead"
        found[name] = serve(made, limits, temperature, seed, name)
    made.runs_ahead = True
    ahead, waiting = found["ahead"], found["waiting"]
    same = sum(a == b for a, b in zip(ahead.ids, waiting.ids, strict=True))
    print(
        f"engine {len(limits):4} streams, temperature {temperature}: {ahead.rate:8.0f} tok/s a "
        f"step ahead, {waiting.rate:8.0f} waiting; first token after "
        f"{ahead.first_seconds * 1e3:.0f} ms; {same} of {len(limits)} answers the same",
        flush=True,
    )


def serve(
    made: PagedEngine,
    limits: Sequence[int],
    temperature: float,
    seed: int,
    tenant: str,
    prompt: int = 128,
) -> Served:
    """One request for each of `limits`, its number of ids. Another `tenant` finds no prompt of an
    earlier one in the cache."""
    draw = random.Random(seed)
    asked = [
        GenerationRequest(
            Prompt(tuple(draw.randrange(1, 199_000) for _ in range(prompt))),
            Sampling(temperature=temperature, max_tokens=limit, ignore_eos=True, seed=1),
            tenant=f"{tenant} {seed}",
        )
        for limit in limits
    ]
    boxes = [BlockingMailbox() for _ in asked]
    begin = time.perf_counter()
    with made._lock:  # the first step sees them all, so that equal calls take equal steps
        for one, box in zip(asked, boxes, strict=True):
            made.submit(one, box)
    answers = [list(box) for box in boxes]
    taken = time.perf_counter() - begin
    ends = [message for answer in answers for message in answer if isinstance(message, Ended)]
    for end in ends:
        if end.outcome != "finished":
            raise RuntimeError(f"a request {end.outcome}: {end.error}")
    firsts = sorted(end.first_token_seconds for end in ends)
    ids = [[i for m in answer if isinstance(m, Tokens) for i in m.ids] for answer in answers]
    return Served(sum(map(len, ids)) / taken, firsts[len(firsts) // 2], ids)


def memory(model: Any, gib: float = 16.0) -> None:
    """As on a card of so many GiB: the rest of this one is taken away first, the driver's share
    included. Then 8 sequences of 8,156 tokens at once, with everything sized by the engine."""
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    small = int(gib * 2**30)
    ballast = torch.empty(total - small, dtype=torch.uint8, device=DEVICE)
    begin, left = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    real = torch.cuda.mem_get_info
    with mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (real()[0], small)):
        made = create_engine(
            model, eos_ids=[0], context_length=8192, device=DEVICE, config=EngineConfig()
        )
    found = serve(made, [256] * 8, 1.0, 0, "", prompt=7900)
    stats, config = made.stats(), made._config
    made.close()
    peak = (torch.cuda.max_memory_allocated() - ballast.nbytes) / 2**30
    print(
        f"as on {gib} GiB ({left / 2**30:.2f} free beside {(begin - ballast.nbytes) / 2**30:.2f} "
        f"of weights): steps of {config.prefill_chunk}, context {made.context_length}; 8 sequences "
        f"of 8,156 tokens, {found.rate:.0f} tok/s over all, {stats.preemptions} preempted: peak "
        f"{peak:.2f} GiB allocated, {torch.cuda.mem_get_info()[0] / 2**30:.2f} GiB never touched",
        flush=True,
    )
