"""Every kernel at 1 to 8,192 rows against float64, cut as it serves; outputs poisoned beforehand.

    python bench/gpu/rows.py

Prints the largest relative error of each kernel and the bound of 1e-2; nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu.sweep import HIDDEN, TOP_K, E, exact_attention, half, weights
from bench.gpu.timing import relative_error
from serve.engine.kernels import attention, experts, fused, gpt_oss, w4, w8
from serve.engine.kernels.draws import draw

DEVICE = torch.device("cuda")
ROWS = (1, 2, 3, 7, 16, 17, 33, 64, 100, 129, 257, 1000, 2048, 8192)
BOUND = 1e-2


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def layer() -> Iterator[tuple[int, float]]:
    """Both expert products with uneven routing: some experts get most tokens, some none."""
    gate_up, down = weights(2 * HIDDEN, HIDDEN), weights(HIDDEN, HIDDEN)
    liked = torch.rand(E, device=DEVICE) ** 4
    liked[[3, 17, 31]] = -1
    for rows in ROWS:
        x = half(torch.randn(rows, HIDDEN))
        indices = (torch.rand(rows, E, device=DEVICE) + 2 * liked).topk(TOP_K).indices
        chosen = torch.rand(rows, TOP_K, device=DEVICE).softmax(-1)
        found = experts.experts(x, experts.route(indices, chosen, E), gate_up, down)
        exact = experts.reference(x.double(), indices, chosen.double(), gate_up, down)
        yield rows, relative_error(found, exact)


def products() -> Iterator[tuple[int, float]]:
    """project and project8, up to where they serve, then 8 bits widened."""
    weight, bias = half(torch.randn(5120, HIDDEN)), half(torch.randn(5120))
    held = w8.hold(weight)
    for rows in ROWS:
        x = half(torch.randn(rows, HIDDEN))
        for matrix, wide in ((weight, weight.double()), (held, held.dequantized(torch.float64))):
            exact = x.double() @ wide.T
            if gpt_oss.is_few(x, matrix):
                made = gpt_oss._product(x, matrix, gpt_oss.QKV).sum(0)
            else:
                made = torch.nn.functional.linear(x, gpt_oss._wide(matrix, x), bias)
                exact += bias.double()
            yield rows, relative_error(made, exact)


def four_bits() -> Iterator[tuple[int, float]]:
    held = w4.W4(
        torch.randint(0, 256, (1024, 1280), dtype=torch.uint8, device=DEVICE),
        torch.rand(20, 1024, device=DEVICE) * 0.01,
        torch.randn(20, 1024, device=DEVICE) * 0.05,
        128,
    )
    wide = held.dequantized(torch.float64)
    for rows in ROWS:
        x = half(torch.randn(rows, 2560))
        yield rows, relative_error(w4.fast(x, held), x.double() @ wide.T)


def decode() -> Iterator[tuple[int, float]]:
    """Odd context lengths, window edges, sinks or none, heads of 64 and 128."""
    for rows in (1, 3, 8, 33, 256):
        for heads, dim in ((64, 64), (32, 128)):
            lengths = torch.randint(1, 700, (rows,), device=DEVICE, dtype=torch.int32)
            edges = torch.tensor([127, 128, 129], device=DEVICE, dtype=torch.int32)
            lengths[: len(edges)] = edges[:rows]
            columns = 23
            pools = [half(torch.randn(rows * columns, 32, 8, dim)) for _ in range(2)]
            table = torch.randperm(rows * columns, device=DEVICE).int().view(rows, columns)
            q = half(torch.randn(rows, heads, dim))
            for window in (None, 128):
                rule = attention.Rule(dim**-0.5, window, half(torch.randn(heads)))
                splits = 1 if window else gpt_oss.splits_for(rows)
                room = attention.Room.create(rows, heads, dim, splits, DEVICE)
                out = torch.full_like(q, float("nan"))
                attention.decode(q, *pools, table, lengths, rule, out, splits, room)
                yield rows, relative_error(out, exact_attention(q, *pools, table, lengths, rule))


def prefill() -> Iterator[tuple[int, float]]:
    """Ragged prompts behind known beginnings; every row of every sequence is compared."""
    heads, dim, columns = 64, 64, 130
    for counts in ([1, 5, 64], [129, 31, 700, 2], [4096], [4000, 96, 3]):
        lengths = [count + 37 * i for i, count in enumerate(counts)]
        pools = [half(torch.randn(len(counts) * columns, 32, 8, dim)) for _ in range(2)]
        table = torch.randperm(len(counts) * columns, device=DEVICE).int().view(-1, columns)
        start = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
        ends = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
        q = half(torch.randn(sum(counts), heads, dim))
        for window in (None, 128):
            rule = attention.Rule(dim**-0.5, window, half(torch.randn(heads)))
            out = torch.full_like(q, float("nan"))
            attention.prefill(q, *pools, table, start, ends, rule, out, max(counts))
            picked = torch.cat(
                [
                    start[i].item() + torch.arange(0, c, max(1, c // 50), device=DEVICE)
                    for i, c in enumerate(counts)
                ]
            )
            owner = torch.bucketize(picked, start[1:].long(), right=True)
            places = (
                picked - start[owner] + ends[owner] - torch.tensor(counts, device=DEVICE)[owner]
            )
            exact = exact_attention(q[picked], *pools, table[owner], places + 1, rule)
            yield sum(counts), relative_error(out[picked], exact)


def norms() -> Iterator[tuple[int, float]]:
    weight = torch.rand(HIDDEN, device=DEVICE)
    for rows in ROWS:
        residual, parts = (
            torch.randn(rows, HIDDEN, device=DEVICE),
            torch.randn(2, rows * 4, HIDDEN, device=DEVICE),
        )
        whole = residual.double() + parts.double().view(2, rows, 4, HIDDEN).sum((0, 2))
        out = poisoned(rows, HIDDEN, dtype=torch.bfloat16)
        fused.add_norm(residual, fused.Parts(parts, 4), weight, 1e-5, out)
        scale = (whole.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        yield (
            rows,
            max(
                relative_error(out, whole * scale * weight.double()),
                relative_error(residual, whole),
            ),
        )


def draws() -> Iterator[tuple[int, float]]:
    """How far the drawn id's place in the cumulative distribution is from the noise."""
    for rows in (1, 17, 256):
        logits, noise = (
            torch.randn(rows, 201_088, device=DEVICE) * 4,
            torch.rand(rows, device=DEVICE),
        )
        out = torch.full((rows,), -7, device=DEVICE)
        draw(logits, torch.ones(rows, device=DEVICE), noise, out)
        odds = logits.double().softmax(-1)
        ends = odds.cumsum(-1).gather(1, out[:, None])[:, 0]
        begins = ends - odds.gather(1, out[:, None])[:, 0]
        yield rows, float(torch.maximum(begins - noise, noise - ends).clamp_min(0).max())


CHECKS: dict[str, Callable[[], Iterator[tuple[int, float]]]] = {
    "experts": layer,
    "products, as stored and in 8 bits": products,
    "4-bit layers": four_bits,
    "attention, one token": decode,
    "attention, prompts": prefill,
    "residual sum and norm": norms,
    "draws": draws,
}


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    for name, check in CHECKS.items():
        found = list(check())
        worst = max(found, key=lambda one: one[1] if one[1] == one[1] else float("inf"))
        rows = sorted({count for count, _ in found})
        is_good = all(error < BOUND for _, error in found)
        print(
            f"{name}: {len(found)} checks, rows {rows}: largest error {worst[1]:.1e} at "
            f"{worst[0]} rows, {'within' if is_good else 'NOT within'} {BOUND}",
            flush=True,
        )


if __name__ == "__main__":
    main()
