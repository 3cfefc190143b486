"""gpt-oss:20b on one GPU: checks the whole model, then times it. One call, under ten minutes.

    python bench/gpu/gpt_oss.py [check|steps|prompts|memory ...]

Weights are made (random, full size, MXFP4 experts); figures are in output tokens a second beside
the memory limit from a measured copy. README.md here keeps the log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import made, others, serving
from bench.gpu.timing import copy_terabytes, graph_microseconds
from serve.engine.kernels import w8
from serve.engine.kernels.gpt_oss import Batch, FusedGptOss

SIZE = 32
DEVICE = torch.device("cuda")


class Cached:
    """A fused model with pools for so many sequences of so many tokens."""

    def __init__(self, model: Any, sequences: int, tokens: int) -> None:
        shape = model.config
        self.columns = -(-tokens // SIZE)
        blocks = sequences * self.columns
        room = (blocks, SIZE, shape.num_key_value_heads, shape.head_dim)
        count = range(shape.num_hidden_layers)
        keys, values = (
            {i: torch.randn(room, dtype=model.dtype, device=DEVICE) for i in count}
            for _ in range(2)
        )
        self.fused = FusedGptOss(model, keys, values, dict.fromkeys(count, 0), tokens)
        order = torch.randperm(blocks, device=DEVICE).int()
        self.tables = order.view(sequences, self.columns)

    def batch(self, ids: Tensor, starts: list[int], counts: list[int]) -> Batch:
        """Sequence i brings counts[i] new tokens from starts[i]; `ids` are all of them."""
        places = [torch.arange(s, s + c) for s, c in zip(starts, counts, strict=True)]
        blocks = self.tables.cpu()
        slots = torch.cat(
            [blocks[i][p // SIZE].long() * SIZE + p % SIZE for i, p in enumerate(places)]
        ).to(DEVICE)
        ends = torch.tensor(starts) + torch.tensor(counts)
        first = torch.cat([torch.zeros(1), torch.tensor(counts).cumsum(0)]).int()
        longest = max(counts)
        return Batch(
            ids=ids.to(DEVICE),
            positions=torch.cat(places).to(DEVICE),
            slots=(slots,),
            tables=(self.tables[: len(counts)],),
            lengths=ends.int().to(DEVICE),
            query_start=first.to(DEVICE),
            decodes=len(counts) if longest == 1 else 0,
            longest=longest,
        )


def check(model: Any, tokens: int = 2000) -> None:
    """The fused path against the stock modules over the same, widened weights: in float32, where
    both must agree, and in bf16, where each is compared with the stock model in float32."""
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=DEVICE)
    in_bf16 = {"ours": fused_logits(model, ids), "stock": stock_logits(model, ids)}
    model.float()
    exact = stock_logits(model, ids)
    compare("float32, ours", fused_logits(model, ids), exact)
    for name, logits in in_bf16.items():
        compare(f"bf16, {name}", logits, exact)
    compare("bf16, ours to stock", in_bf16["ours"], in_bf16["stock"])
    model.bfloat16()


def compare(name: str, found: Tensor, exact: Tensor) -> None:
    agreement = (found.argmax(-1) == exact.argmax(-1)).float().mean()
    logp = exact.log_softmax(-1)
    divergence = (logp.exp() * (logp - found.log_softmax(-1))).sum(-1)
    print(
        f"whole model, {len(found)} positions, {name}: top-1 agreement {agreement:.4f}, KL "
        f"{divergence.mean():.2e} (largest {divergence.max():.2e}), relative difference "
        f"{(found - exact).norm() / exact.norm():.2e}, of the decoded "
        f"{(found[-8:] - exact[-8:]).norm() / exact[-8:].norm():.2e}",
        flush=True,
    )


def fused_logits(model: Any, ids: Tensor) -> Tensor:
    """All but eight positions as one prompt, the last eight one by one."""
    tokens = ids.shape[1]
    fast = Cached(model, 1, tokens)
    found = [fast.fused.forward(fast.batch(ids[0, : tokens - 8], [0], [tokens - 8]), None).float()]
    for at in range(tokens - 8, tokens):
        found.append(fast.fused.forward(fast.batch(ids[0, at : at + 1], [at], [1]), None).float())
    return torch.cat(found)


@torch.inference_mode()
def stock_logits(model: Any, ids: Tensor) -> Tensor:
    """Stock forward, each layer's experts widened to bf16 while it runs."""
    kept = [layer.mlp.experts for layer in model.model.layers]
    for layer, held in zip(model.model.layers, kept, strict=True):
        layer.mlp.experts = _Widening(model.config, held)
    logits = model(ids).logits[0].float()
    for layer, held in zip(model.model.layers, kept, strict=True):
        layer.mlp.experts = held
    return logits


class _Widening(nn.Module):
    """The stock experts module, its weights widened just before it runs."""

    def __init__(self, config: Any, held: Any) -> None:
        super().__init__()
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        with torch.device("meta"):
            self.stock = GptOssExperts(config)
        self.held = [held]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (held,) = self.held
        for name, weights in (("gate_up_proj", held.gate_up), ("down_proj", held.down)):
            dtype = args[0].dtype
            setattr(self.stock, name, nn.Parameter(made.widened(weights, dtype), False))
            bias = nn.Parameter(weights.bias.to(dtype), False)
            setattr(self.stock, f"{name}_bias", bias)
        result = self.stock(*args, **kwargs)
        self.stock.to("meta")  # one layer's widened weights at a time
        return result


def steps(model: Any) -> None:
    """A decode step in a CUDA graph, by streams and context: forward and argmax."""
    limit = copy_terabytes()
    for context, streams in ((256, (1, 2, 4, 8, 16, 32, 64, 128, 256)), (1024, (1, 32, 64)),
                             (8192, (32,))):  # fmt: skip
        for count in streams:
            cached = Cached(model, count, context)
            ids = torch.randint(0, model.config.vocab_size, (count,))
            batch = cached.batch(ids, [context - 1] * count, [1] * count)
            forward = partial(cached.fused.forward, batch, None)
            taken = graph_microseconds([lambda run=forward: run().argmax(-1)])
            print(
                f"step {count:4} streams at {context:5}: {taken:8.1f} us = "
                f"{count / taken * 1e6:8.0f} tok/s (copy {limit:.2f} TB/s)",
                flush=True,
            )
            del cached, batch
            torch.cuda.empty_cache()


def eight(model: Any) -> None:
    """Attention and vocabulary in 8 bits: what changes in the logits, in steps and in memory. The
    model stays so: the last part, but for those that are to be measured so."""
    ids = torch.randint(0, model.config.vocab_size, (1, 2000), device=DEVICE)
    before = fused_logits(model, ids)
    print(f"held in 8 bits: {w8.hold_dense(model) / 1e9:.2f} GB less")
    torch.cuda.empty_cache()
    compare("in 8 bits, to as stored", fused_logits(model, ids), before)
    steps(model)
    prompts(model)


def prompts(model: Any) -> None:
    """8 prompts of 4,096 tokens, in chunks."""
    cached = Cached(model, 8, 4096)
    for chunk in (1024, 4096, 8192):
        each = min(chunk, 4096)
        together = max(1, chunk // 4096)
        ids = torch.randint(0, model.config.vocab_size, (each * together,))
        starts = range(0, 4096, each)
        batches = [cached.batch(ids, [s] * together, [each] * together) for s in starts]
        rows = torch.tensor([each * together - 1], device=DEVICE)
        for batch in batches:
            cached.fused.forward(batch, rows)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(8 // together):
            for batch in batches:
                cached.fused.forward(batch, rows)
        torch.cuda.synchronize()
        taken = time.perf_counter() - begin
        print(f"prompts 8 x 4096 in steps of {chunk}: {taken:.3f} s = {32768 / taken:.0f} in/s")


def profile(model: Any) -> None:
    """Where a step's time goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for count, new in ((1, 1), (8, 1), (64, 1), (1, 4096)):
        cached = Cached(model, count, max(256, new))
        ids = torch.randint(0, model.config.vocab_size, (count * new,))
        batch = cached.batch(ids, [256 - 1 if new == 1 else 0] * count, [new] * count)
        rows = None if new == 1 else torch.tensor([new - 1], device=DEVICE)
        cached.fused.forward(batch, rows)
        with record(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(3):
                cached.fused.forward(batch, rows)
            torch.cuda.synchronize()
        rated = sorted(recorded.key_averages(), key=lambda e: -e.device_time_total)[:12]
        for event in rated:
            print(
                f"profile {count} x {new}: {event.device_time_total / 3:9.1f} us a step, "
                f"{event.count // 3:4} launches  {event.key[:60]}"
            )


PARTS: dict[str, Callable[[Any], None]] = {
    "check": check,
    "steps": steps,
    "prompts": prompts,
    "engine": serving.engine,
    "memory": serving.memory,
    "load": others.load,
    "dense": others.dense,
    "w4": others.w4_layers,
    "stock": others.stock,
    "profile": profile,
    "rates": serving.rates,
    "eight": eight,
}


def main() -> None:
    print(torch.cuda.get_device_name(), f"copy {copy_terabytes():.2f} TB/s", flush=True)
    begin = time.perf_counter()
    model = made.model(DEVICE)
    held = torch.cuda.memory_allocated() / 2**30
    print(f"made in {time.perf_counter() - begin:.1f} s, {held:.2f} GiB", flush=True)
    for name in sys.argv[1:] or (part for part in PARTS if part != "rates"):
        try:
            PARTS[name](model)
        except Exception as error:  # one part's fault leaves the others their turn
            print(name, "failed:", repr(error)[:3000], flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
