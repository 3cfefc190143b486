"""Which cut of each kernel is fastest: times candidates, and checks each against float64.

    python bench/gpu/sweep.py [gate_up|down|project|project8|attention|prefill ...]

Candidates compile in parallel processes first (Triton's cache on disk then serves this one). The
winners are written by hand into experts.gate_up_tile, experts.down_tile and gpt_oss.py; README.md
here keeps the log.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu.timing import copy_terabytes, graph_microseconds, relative_error
from serve.engine.kernels import attention, experts, fused, w8

E, HIDDEN, MIDDLE, TOP_K = 32, 2880, 2880, 4
LAYERS = 4
DEVICE = torch.device("cuda")

SKINNY = [
    (64, 16, 64, 3, 4),
    (64, 16, 64, 4, 4),
    (64, 16, 64, 2, 4),
    (64, 16, 128, 2, 4),
    (64, 16, 128, 3, 4),
    (128, 16, 64, 3, 4),
    (128, 16, 64, 3, 8),
    (128, 16, 128, 2, 8),
    (32, 16, 64, 3, 4),
    (32, 16, 64, 4, 2),
    (32, 16, 128, 3, 4),
    (64, 32, 64, 3, 4),
    (128, 32, 64, 3, 8),
    (64, 64, 64, 2, 4),
]
WIDE = [
    (128, 128, 32, 3, 8),
    (128, 128, 64, 2, 8),
    (128, 128, 64, 3, 8),
    (128, 256, 32, 2, 8),
    (128, 64, 64, 3, 8),
    (64, 128, 64, 2, 4),
    (64, 256, 32, 2, 4),
    (64, 128, 32, 3, 4),
    (128, 128, 32, 2, 8),
    (64, 128, 32, 2, 4),
    (128, 64, 32, 2, 8),
    (128, 64, 32, 3, 4),
]
CUTS = [
    (32, 128, 1, 4, 4), (32, 128, 2, 4, 4), (32, 128, 4, 4, 4), (32, 256, 2, 3, 4),
    (64, 128, 1, 4, 4), (64, 128, 2, 4, 4), (64, 128, 4, 4, 4), (64, 64, 4, 5, 4),
    (16, 256, 1, 4, 4), (16, 256, 2, 4, 2), (128, 64, 4, 4, 4), (128, 128, 1, 3, 8),
    (16, 512, 1, 3, 4), (32, 256, 1, 4, 4),
]  # fmt: skip
CUTS8 = [
    (64, 64, 1, 4, 4), (64, 64, 2, 4, 4), (64, 64, 4, 4, 4), (64, 128, 1, 3, 4),
    (64, 128, 2, 3, 4), (64, 128, 4, 3, 4), (64, 32, 4, 5, 4), (64, 64, 8, 4, 4),
    (128, 64, 1, 3, 8), (128, 64, 2, 3, 8), (64, 256, 1, 2, 4), (64, 256, 2, 2, 4),
]  # fmt: skip
DENSE = {"qkv": (5120, 2880), "o": (2880, 4096), "head": (201088, 2880)}


def weights(rows: int, columns: int) -> experts.ExpertWeights:
    """Random MXFP4 bytes with scales near those of a trained model."""
    blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8, device=DEVICE)
    scales = torch.randint(118, 123, (E, rows, columns // 32), dtype=torch.uint8, device=DEVICE)
    return experts.expert_weights(
        blocks, scales, torch.randn(E, rows, device=DEVICE, dtype=torch.bfloat16)
    )


def routing(tokens: int) -> tuple[experts.Routing, torch.Tensor]:
    indices = torch.rand(tokens, E, device=DEVICE).argsort(-1)[:, :TOP_K]
    chosen = torch.rand(tokens, TOP_K, device=DEVICE).softmax(-1)
    return experts.route(indices, chosen, E), indices


def half(x: torch.Tensor) -> torch.Tensor:
    return x.to(DEVICE, torch.bfloat16)


def expert_call(
    kind: str, tile: experts.Tile, held: experts.ExpertWeights, r: experts.Routing, x: torch.Tensor
) -> tuple[Callable[[], None], torch.Tensor]:
    pairs = r.weights.numel()
    if kind == "gate_up":
        out = torch.full((pairs, MIDDLE), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        return lambda: experts.gate_up_product(x, held, r, out, 1.702, 7.0, tile), out
    out = torch.full((tile.splits, pairs, HIDDEN), float("nan"), device=DEVICE)
    return lambda: experts.down_product(x, held, r, out, tile), out


def exact_expert(
    kind: str, held: experts.ExpertWeights, r: experts.Routing, ids: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """float64, from the definition, [pairs, columns] quartered or not as the kernel gives it."""
    x = experts.unquarter(x).double()
    rows = x.repeat_interleave(TOP_K, 0) if kind == "gate_up" else x
    out = torch.empty(rows.shape[0], held.rows, device=DEVICE, dtype=torch.float64)
    for expert in ids.unique().tolist():
        hit = torch.where(ids.flatten() == expert)[0]
        matrix = held.dequantized(expert, torch.float64)
        out[hit] = rows[hit] @ matrix.T + held.bias[expert].double()
    if kind == "down":
        return out * r.weights.flatten()[:, None].double()
    gate, up = out[:, 0::2].clamp(max=7), out[:, 1::2].clamp(-7, 7)
    return experts.quarter((up + 1) * gate * torch.sigmoid(1.702 * gate))


def sweep_experts(kind: str, tiles: list[tuple[int, ...]], sizes: tuple[int, ...]) -> Iterator[str]:
    torch.manual_seed(0)
    rows = 2 * MIDDLE if kind == "gate_up" else HIDDEN
    held = [weights(rows, HIDDEN) for _ in range(LAYERS)]
    parts = (1,) if kind == "gate_up" or sizes[0] > 512 else (1, 2, 3)
    for tokens in sizes:
        r, ids = routing(tokens)
        hit = ids.unique().numel()
        count = tokens if kind == "gate_up" else tokens * TOP_K
        x = half(torch.randn(count, HIDDEN))
        exact = exact_expert(kind, held[0], r, ids, x) if tokens <= 4096 else None
        others = [routing(tokens)[0] for _ in held]
        found = []
        for numbers in tiles:
            for splits in parts:
                tile = experts.Tile(*numbers, splits)
                if not fits(expert_call(kind, tile, held[0], r, x)[0]):
                    continue
                call, out = expert_call(kind, tile, held[0], r, x)
                call()
                made = out if kind == "gate_up" else out.sum(0)
                error = relative_error(made, exact) if exact is not None else 0.0
                calls = [
                    expert_call(kind, tile, h, o, x)[0] for h, o in zip(held, others, strict=True)
                ] * (4 if tokens <= 256 else 1)
                found.append((graph_microseconds(calls), error, tile))
        gigabytes = hit * rows * (HIDDEN // 2 + HIDDEN // 32) / 1e9
        work = 2 * tokens * TOP_K * rows * HIDDEN / 1e6
        for taken, error, tile in sorted(found, key=lambda f: f[0])[:6]:
            yield (
                f"{kind:8} T={tokens:5} {taken:8.1f} us {gigabytes / taken * 1e3:6.2f} TB/s "
                f"{work / taken:6.1f} TFLOP/s err {error:.1e} {tile}"
            )


def fits(call: Callable[[], object]) -> bool:
    from triton.runtime.errors import OutOfResources

    try:
        call()
    except OutOfResources:
        return False
    return True


def sweep_project(sizes: tuple[int, ...] = (1, 8, 32, 64, 128)) -> Iterator[str]:
    torch.manual_seed(0)
    for name, (rows, columns) in DENSE.items():
        copies = [half(torch.randn(rows, columns)) for _ in range(1 if name == "head" else 8)]
        for tokens in sizes:
            x = half(torch.randn(tokens, columns))
            exact = x.double() @ copies[0].double().T if name != "head" else None
            found: list[tuple[float, float, object]] = []
            plain = [lambda w=w: torch.nn.functional.linear(x, w) for w in copies]  # type: ignore[misc]
            found.append((graph_microseconds(plain * (1 if name == "head" else 4)), 0.0, "cuBLAS"))
            for numbers in CUTS:
                cut = fused.Cut(*numbers)
                if name == "head" and cut.splits > 1:
                    continue
                out = torch.full((cut.splits, tokens, rows), float("nan"), device=DEVICE)
                if not fits(lambda: fused.project(x, copies[0], out, cut)):
                    continue
                error = relative_error(out.sum(0), exact) if exact is not None else 0.0
                calls = [lambda w=w: fused.project(x, w, out, cut) for w in copies]  # type: ignore[misc]
                found.append((graph_microseconds(calls * (1 if name == "head" else 4)), error, cut))
            for taken, error, cut in sorted(found, key=lambda f: f[0])[:4] + found[:1]:
                rate = rows * columns * 2 / taken / 1e6
                yield (
                    f"{name:5} T={tokens:4} {taken:8.1f} us {rate:5.2f} TB/s err {error:.1e} {cut}"
                )


def sweep_project8(sizes: tuple[int, ...] = (1, 8, 32, 64, 128)) -> Iterator[str]:
    """Matrices in 8 bits, beside the library's product with them in bf16."""
    torch.manual_seed(0)
    for name, (rows, columns) in DENSE.items():
        stored = [half(torch.randn(rows, columns)) for _ in range(1 if name == "head" else 8)]
        held = [w8.hold(matrix) for matrix in stored]
        for tokens in sizes:
            x = half(torch.randn(tokens, columns))
            few = 4096  # rows that are compared; all of them in float64 are too large for the head
            exact = x.double() @ held[0].rows_of(0, few).dequantized(torch.float64).T
            plain = [lambda w=w: torch.nn.functional.linear(x, w) for w in stored]  # type: ignore[misc]
            again = 1 if name == "head" else 4
            found: list[tuple[float, float, object]] = [
                (graph_microseconds(plain * again), 0.0, "cuBLAS in bf16")
            ]
            for numbers in CUTS8:
                cut = fused.Cut(*numbers)
                if name == "head" and cut.splits > 1:
                    continue
                out = torch.full((cut.splits, tokens, rows), float("nan"), device=DEVICE)
                if not fits(lambda: w8.project(x, held[0], out, cut)):
                    continue
                error = relative_error(out.sum(0)[:, :few], exact[:, :rows])
                calls = [lambda w=w: w8.project(x, w, out, cut) for w in held]  # type: ignore[misc]
                found.append((graph_microseconds(calls * again), error, cut))
            for taken, error, cut in sorted(found, key=lambda f: f[0])[:4] + found[:1]:
                rate = rows * columns / taken / 1e6
                yield (
                    f"{name:5} 8-bit T={tokens:4} {taken:8.1f} us {rate:5.2f} TB/s "
                    f"err {error:.1e} {cut}"
                )


def sweep_attention() -> Iterator[str]:
    torch.manual_seed(0)
    heads, kv_heads, dim, size = 64, 8, 64, 32
    for tokens, context in ((1, 1024), (1, 8192), (8, 1024), (32, 1024), (32, 8192), (128, 1024)):
        columns = -(-context // size)
        pools = [half(torch.randn(tokens * columns, size, kv_heads, dim)) for _ in range(4)]
        table = torch.randperm(tokens * columns, device=DEVICE).int().view(tokens, columns)
        lengths = torch.full((tokens,), context - 3, device=DEVICE, dtype=torch.int32)
        q = half(torch.randn(tokens, heads, dim))
        sinks = half(torch.randn(heads))
        for window in (None, 128):
            for splits in (1, 2, 4, 8, 16, 32):
                if splits > (1 if window else -(-context // 128)):
                    continue
                room = attention.Room.create(tokens, heads, dim, splits, DEVICE)
                out = torch.full_like(q, float("nan"))
                rule = attention.Rule(dim**-0.5, window, sinks)

                def call(i: int) -> None:
                    attention.decode(
                        q,
                        pools[i],
                        pools[i + 1],
                        table,
                        lengths,
                        rule,
                        out,
                        splits,
                        room,
                    )

                taken = graph_microseconds([lambda: call(0), lambda: call(2)] * 4)
                seen = min(context, window or context)
                read = tokens * seen * kv_heads * dim * 4
                call(0)
                exact = exact_attention(q, pools[0], pools[1], table, lengths, rule)
                yield (
                    f"decode T={tokens:3} ctx={context} window={window} splits={splits:2} "
                    f"{taken:7.1f} us {read / taken / 1e6:5.2f} TB/s "
                    f"err {relative_error(out, exact):.1e}"
                )


def exact_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    rule: attention.Rule,
) -> torch.Tensor:
    """float64; one query a sequence, the newest."""
    made = []
    for i, length in enumerate(lengths.tolist()):
        first = max(0, length - rule.window) if rule.window else 0
        k, v = (p[table[i].long()].flatten(0, 1)[first:length].double() for p in (keys, values))
        k, v = (p.repeat_interleave(q.shape[1] // p.shape[1], 1) for p in (k, v))
        scores = torch.einsum("hd,lhd->hl", q[i].double(), k) * rule.scale
        assert rule.sinks is not None
        scores = torch.cat([scores, rule.sinks.double()[:, None]], 1).softmax(-1)[:, :-1]
        made.append(torch.einsum("hl,lhd->hd", scores, v))
    return torch.stack(made)


def sweep_prefill_attention() -> Iterator[str]:
    heads, kv_heads, dim, size = 64, 8, 64, 32
    for sequences, count in ((2, 4096), (8, 1024)):
        columns = -(-count // size)
        pools = [half(torch.randn(sequences * columns, size, kv_heads, dim)) for _ in range(2)]
        table = torch.randperm(sequences * columns, device=DEVICE).int().view(sequences, columns)
        lengths = torch.full((sequences,), count, device=DEVICE, dtype=torch.int32)
        start = torch.arange(sequences + 1, device=DEVICE, dtype=torch.int32) * count
        q = half(torch.randn(sequences * count, heads, dim))
        out = torch.full_like(q, float("nan"))
        for window in (None, 128):
            rule = attention.Rule(dim**-0.5, window, half(torch.randn(heads)))

            def call() -> None:
                attention.prefill(q, *pools, table, start, lengths, rule, out, count)

            taken = graph_microseconds([call])
            last = torch.arange(1, sequences + 1, device=DEVICE) * count - 1
            exact = exact_attention(q[last], *pools, table, lengths, rule)
            work = 4 * sequences * heads * dim * (count**2 / 2 if not window else count * window)
            yield (
                f"prefill {sequences}x{count} window={window} {taken:9.1f} us "
                f"{work / taken / 1e6:6.1f} TFLOP/s err {relative_error(out[last], exact):.1e}"
            )


def sweep_small() -> Iterator[str]:
    torch.manual_seed(0)
    route = half(torch.randn(E, HIDDEN) * 0.02)
    bias, norm = half(torch.randn(E)), torch.rand(HIDDEN, device=DEVICE)
    for tokens in (1, 32, 128, 4096):
        residual = torch.randn(tokens, HIDDEN, device=DEVICE)
        parts = fused.Parts(torch.randn(1, tokens * 4, HIDDEN, device=DEVICE), 4)
        out = half(torch.empty(tokens, HIDDEN))
        counts = torch.zeros(E, device=DEVICE, dtype=torch.int32)
        pairs = torch.empty(E, tokens * 100, device=DEVICE, dtype=torch.int32)
        r = experts.Routing(counts, pairs, torch.empty(tokens, TOP_K, device=DEVICE))
        slots = torch.arange(tokens, device=DEVICE)
        router = fused.Router(route, bias, TOP_K, slots, r)
        pools = [half(torch.randn(tokens, 32, 8, 64)) for _ in range(2)]
        qkv = fused.Parts(torch.randn(2, tokens, 5120, device=DEVICE), 1, half(torch.randn(5120)))
        q = half(torch.empty(tokens, 64, 64))
        turns = torch.randn(tokens, 64, device=DEVICE)

        def routed() -> None:
            counts.zero_()
            fused.add_norm_route(residual, parts, norm, 1e-5, out, router)

        a = graph_microseconds([routed] * 8)
        z = graph_microseconds([lambda: counts.zero_()] * 8)
        b = graph_microseconds([lambda: fused.add_norm(residual, parts, norm, 1e-5, out)] * 8)
        c = graph_microseconds(
            [lambda: fused.rotate_and_store(qkv, turns, slots, slots, q, *pools)] * 8
        )
        yield (
            f"small T={tokens:4} norm+route {a - z:6.1f} us, norm {b:6.1f} us, rotate {c:6.1f} us, "
            f"an empty launch {z:.1f} us"
        )


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "gate_up": lambda: sweep_experts("gate_up", SKINNY, (1, 8, 32, 64, 128)),
    "down": lambda: sweep_experts("down", SKINNY, (1, 8, 32, 64, 128)),
    "project": sweep_project,
    "project8": sweep_project8,
    "attention": sweep_attention,
    "prefill_attention": sweep_prefill_attention,
    "prefill_gate_up": lambda: sweep_experts("gate_up", WIDE, (1024, 4096, 8192)),
    "prefill_down": lambda: sweep_experts("down", WIDE, (1024, 4096)),
    "small": sweep_small,
}


def compile_share(share: list[tuple[str, tuple[int, ...]]]) -> None:
    """In a process of its own: make Triton compile these candidates (and keep them on disk)."""
    made: dict[int, experts.ExpertWeights] = {}
    for kind, numbers in share:
        if kind in ("gate_up", "down"):
            rows = 2 * MIDDLE if kind == "gate_up" else HIDDEN
            held = made.setdefault(rows, weights(rows, HIDDEN))
            r, _ = routing(1)
            x = half(torch.randn(1 if kind == "gate_up" else TOP_K, HIDDEN))
            fits(expert_call(kind, experts.Tile(*numbers), held, r, x)[0])
        else:
            rows, columns = DENSE[kind.removesuffix(" 8")]
            tokens, cut = numbers[0], fused.Cut(*numbers[1:])
            x = half(torch.randn(tokens, columns))
            out = torch.empty((cut.splits, tokens, rows), device=DEVICE)
            if kind.endswith(" 8"):
                words = torch.zeros((rows, columns // 2), dtype=torch.int16, device=DEVICE)
                matrix = w8.W8(words, torch.zeros(rows, device=DEVICE))
                fits(lambda: w8.project(x, matrix, out, cut))
            else:
                w = half(torch.randn(rows, columns))
                fits(lambda: fused.project(x, w, out, cut))
    torch.cuda.synchronize()


def compile_all(names: list[str], processes: int = 14) -> None:
    jobs: list[tuple[str, tuple[int, ...]]] = []
    for kind in ("gate_up", "down"):
        parts = (1,) if kind == "gate_up" else (1, 2, 3)
        if kind in names:
            jobs += [(kind, (*t, s)) for t in SKINNY for s in parts]
        if f"prefill_{kind}" in names:
            jobs += [(kind, (*t, 1)) for t in WIDE]
    for tokens in (1, 32, 64, 128) if "project" in names else ():
        jobs += [(n, (tokens, *c)) for n in DENSE for c in CUTS if n != "head" or c[2] == 1]
    for tokens in (1, 32, 64, 128) if "project8" in names else ():
        jobs += [(f"{n} 8", (tokens, *c)) for n in DENSE for c in CUTS8 if n != "head" or c[2] == 1]
    context = multiprocessing.get_context("spawn")
    shares = [jobs[i::processes] for i in range(processes)]
    running = [context.Process(target=compile_share, args=(share,)) for share in shares]
    for process in running:
        process.start()
    for process in running:
        process.join()


def main() -> None:
    names = sys.argv[1:] or list(PARTS)
    print(torch.cuda.get_device_name(), f"copy {copy_terabytes():.2f} TB/s", flush=True)
    torch.cuda.empty_cache()
    compile_all(names)
    print("compiled", flush=True)
    for name in names:
        try:
            for line in PARTS[name]():
                print(line, flush=True)
        except Exception as error:  # one part's fault leaves the others their turn
            print(name, "failed:", repr(error)[:2000], flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
