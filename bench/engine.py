"""The engine alone: time and memory a step against batch size and context length.

For each batch size the same prompts run through ours and through transformers' batched generate in
one run; then one step of ours is timed at several context lengths, and what Python costs beside the
forward pass; then a second chat turn against its first, and a short prompt's first token while
others decode. With --plot it draws docs/engine.svg (needs matplotlib). Usage:
.venv/bin/python -m bench.engine MODEL.gguf [--plot docs/engine.svg]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from serve.engine import sampling
from serve.engine.config import EngineConfig
from serve.engine.engine import PagedEngine
from serve.engine.face import BlockingMailbox, GenerationRequest, Prompt
from serve.engine.runner import create_runner
from serve.values import Sampling

TOKENS = 48
STEPS = 100
PROMPT = 40
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--batches", default="1,4,8,16,32")
    parser.add_argument("--contexts", default="128,512,2048")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batches = [int(n) for n in options.batches.split(",")]
    contexts = [int(n) for n in options.contexts.split(",")]
    theirs = {n: generate_rate(load(options.gguf), n) for n in batches}
    model = load(options.gguf)
    engine = made(model)
    for count in batches:
        ours = our_rate(engine, count)
        print(
            f"{count:3} streams: ours {ours:7.1f} tok/s, batched generate {theirs[count]:7.1f}, "
            f"ratio {ours / theirs[count]:.2f}",
            flush=True,
        )
    points = {context: [step_of(engine, n, context) for n in batches] for context in contexts}
    for context, steps in points.items():
        for count, (whole, drawing, beside) in zip(batches, steps, strict=True):
            print(
                f"context {context:5}, {count:3} streams: step {whole:7.1f} ms, drawing "
                f"{drawing:5.2f} ms, other Python outside forward {beside:5.2f} ms (p99)",
                flush=True,
            )
    second_turn(engine)
    first_token_beside(engine, 8)
    if options.plot:
        plot(options.plot, batches, points, bytes_per_token(engine))


def load(gguf: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()


def made(model: Any) -> PagedEngine:
    """An engine without its thread: the script calls step()."""
    config = EngineConfig(kv_cache_gb=4.0, packs_weights=True).for_device("cpu")
    runner, cache, context = create_runner(model, CPU, context_length=8192, config=config)
    return PagedEngine(
        runner,
        cache,
        config,
        eos_ids=frozenset(),
        context_length=context,
        vocabulary=runner.vocabulary,
    )


def prompt(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(5, 49_000) for _ in range(length))


def submit(engine: PagedEngine, ids: tuple[int, ...], tokens: int) -> int:
    greedy = Sampling(temperature=0.0, max_tokens=tokens)
    return engine.submit(GenerationRequest(Prompt(ids), greedy), BlockingMailbox())


def finish(engine: PagedEngine) -> None:
    engine.step()
    while engine.stats().running:
        engine.step()


def our_rate(engine: PagedEngine, count: int) -> float:
    for i in range(count):
        submit(engine, prompt(PROMPT, count * 100 + i), TOKENS)
    began = time.perf_counter()
    finish(engine)
    return count * TOKENS / (time.perf_counter() - began)


@torch.inference_mode()
def generate_rate(model: Any, count: int) -> float:
    ids = torch.tensor([prompt(PROMPT, count * 100 + i) for i in range(count)])
    length = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    began = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), **length)
    return count * TOKENS / (time.perf_counter() - began)


def step_of(engine: PagedEngine, count: int, context: int) -> tuple[float, float, float]:
    """Milliseconds of a decode step with `count` sequences of `context` tokens (median), of drawing
    its ids (median), and of what is neither that nor the model's forward (99th percentile)."""
    numbers = [submit(engine, prompt(context, 7 * context + i), 200) for i in range(count)]
    engine.step()
    while (
        any(not s.has_prefilled for s in engine._scheduler.running)
        or len(engine._scheduler.running) < count
    ):
        engine.step()
    model = engine._runner._model
    steps: list[tuple[float, float, float]] = []
    with timed(model, "forward") as forward, timed(sampling, "draw") as drawing:
        for _ in range(STEPS):
            began = time.perf_counter()
            engine.step()
            whole = time.perf_counter() - began
            inside, drawn = forward.pop(), drawing.pop()
            steps.append((1000 * whole, 1000 * drawn, 1000 * (whole - inside - drawn)))
    for number in numbers:
        engine.cancel(number)
    finish(engine)
    wholes, draws, others = zip(*steps, strict=True)
    return statistics.median(wholes), statistics.median(draws), sorted(others)[-STEPS // 100 - 1]


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Seconds of each call of a function while this lasts."""
    real, seconds = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        out = real(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return out

    setattr(owner, name, call)
    yield seconds
    setattr(owner, name, real)


def second_turn(engine: PagedEngine) -> None:
    """A chat of 1,500 tokens, then the same with 30 more: seconds to the first token of each."""
    ids = prompt(1500, 99)
    times = []
    for asked in (ids, ids + prompt(30, 98)):
        submit(engine, asked, 1)
        began = time.perf_counter()
        finish(engine)
        times.append(time.perf_counter() - began)
    print(
        f"first token of a 1,500-token chat: {times[0]:.2f} s, of its second turn {times[1]:.3f} s,"
        f" {times[0] / times[1]:.1f} times faster"
    )


def first_token_beside(engine: PagedEngine, others: int) -> None:
    """A prompt of 40 tokens while `others` decode: steps and milliseconds to its first token."""
    numbers = [submit(engine, prompt(200, 50 + i), 400) for i in range(others)]
    while len(engine._scheduler.running) < others or any(
        not s.has_prefilled for s in engine._scheduler.running
    ):
        engine.step()
    counts, times = [], []
    for go in range(20):
        number = submit(engine, prompt(PROMPT, 1000 + go), 4)
        began, steps = time.perf_counter(), 0
        while number not in engine._requests or not engine._requests[number].sequences[0].drawn:
            engine.step()
            steps += 1
        times.append(1000 * (time.perf_counter() - began))
        counts.append(steps)
        while number in engine._requests:
            engine.step()
    for number in numbers:
        engine.cancel(number)
    finish(engine)
    print(
        f"first token of a {PROMPT}-token prompt while {others} others decode: {max(counts)} steps "
        f"at most, {statistics.median(times):.0f} ms (median)"
    )


def bytes_per_token(engine: PagedEngine) -> int:
    backend: Any = engine._runner._backend
    return sum(
        2 * pool.shape[2] * pool.shape[3] * pool.element_size() for pool in backend.keys.values()
    )


def plot(
    path: Path, batches: list[int], points: dict[int, list[tuple[float, float, float]]], token: int
) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for context, steps in points.items():
        label = f"{context} tokens of context"
        left.plot(batches, [step[0] for step in steps], marker="o", label=label)
        memory = [count * context * token / 2**20 for count in batches]
        right.plot(batches, memory, marker="o", label=label)
    left.set(xlabel="streams", ylabel="ms a step", title="Time a decode step", ylim=(0, None))
    right.set(xlabel="streams", ylabel="MiB", title="KV cache held", ylim=(0, None))
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
