"""Compile the kernels without a GPU: record what the launchers launch, then compile it ahead of
time for a named compute capability."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "launch_pdl")


@dataclass
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def compile(self, capability: int) -> Any:
        """The compiled kernel; raises whatever Triton's compiler raises."""
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[(place,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _TYPES[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32"
        source = ASTSource(self.kernel, signature, constants, attributes)
        return compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it, launching a kernel only notes the launch."""
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        names = [parameter.name for parameter in self.params]
        launches.append(Launch(self, {**dict(zip(names, args, strict=False)), **kwargs}, options))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


def launch_everything(dtype: torch.dtype) -> None:
    """Every kernel, by its launcher, in gpt-oss-20b's shapes and in others of 128 a head."""
    from serve.engine.kernels import attention, experts, fused, w4, w8
    from serve.engine.kernels.draws import draw, follow

    count, hidden, tokens = 32, 2880, 8

    def zeros(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

    def held(rows: int) -> experts.ExpertWeights:
        words = zeros(count, rows, hidden // 4, of=torch.int16)
        scales = zeros(count, rows, 96, of=torch.uint8)
        return experts.ExpertWeights(words, scales, zeros(count, rows), True)

    for many in (8, 1024):
        routing = experts.Routing(
            zeros(count, of=torch.int32), zeros(count, many, of=torch.int32),
            zeros(many, 4, of=torch.float32),
        )  # fmt: skip
        experts.experts(zeros(many, hidden), routing, held(2 * hidden), held(hidden))
    lengths, tables = zeros(tokens, of=torch.int32), zeros(tokens, 4, of=torch.int32)
    starts = zeros(tokens + 1, of=torch.int32)
    for heads, dim, window in ((64, 64, 128), (64, 64, None), (32, 128, None)):
        query, pool = zeros(tokens, heads, dim), zeros(4, 32, 8, dim)
        rule = attention.Rule(0.1, window, zeros(heads) if dim == 64 else None)
        room = attention.Room.create(tokens, heads, dim, 4, torch.device("cpu"))
        attention.decode(query, pool, pool, tables, lengths, rule, query, 1, None)
        attention.decode(query, pool, pool, tables, lengths, rule, query, 4, room)
        attention.prefill(query, pool, pool, tables, starts, lengths, rule, query, 8)
    single = torch.float32
    slots, query, pool = zeros(tokens, of=torch.int64), zeros(tokens, 64, 64), zeros(4, 32, 8, 64)
    routing = experts.Routing(
        zeros(count, of=torch.int32), zeros(count, tokens, of=torch.int32),
        zeros(tokens, 4, of=single),
    )  # fmt: skip
    router = fused.Router(zeros(count, hidden), zeros(count), 4, slots, routing)
    parts = fused.Parts(zeros(2, tokens * 4, hidden, of=single), 4)
    residual, norm, x = zeros(tokens, hidden, of=single), zeros(hidden), zeros(tokens, hidden)
    fused.add_norm_route(residual, parts, norm, 1e-5, x, router)
    fused.add_norm(residual, None, norm, 1e-5, x)
    fused.route(x, router, router.weight)
    joined = fused.Parts(zeros(2, tokens, 5120, of=single), 1, zeros(5120))
    fused.rotate_and_store(joined, zeros(99, 64, of=single), slots, slots, query, pool, pool)
    fused.store(zeros(8, tokens, 64), zeros(8, tokens, 64), slots, pool, pool)
    out = zeros(2, tokens, 5120, of=single)
    fused.project(x, zeros(5120, hidden), out, fused.Cut(64, 128, 2, 4, 4))
    rounded = w8.W8(zeros(5120, hidden // 2, of=torch.int16), zeros(5120, of=single))
    w8.project(x, rounded, out, fused.Cut(64, 64, 2, 4, 4))
    row = zeros(tokens, of=single)
    draw(zeros(tokens, 201_088), row, row, slots)
    follow(slots, slots, slots, slots)
    groups = zeros(40, 1024, of=single)
    packed = w4.W4(zeros(1024, 2560, of=torch.uint8), groups, groups, 128)
    w4.product(zeros(tokens, 5120), packed)
    w4.widen(packed, 0, zeros(64, 5120))


def main() -> None:
    """Compile everything for the capability named on the command line."""
    from serve.engine.kernels import experts

    capability = int(sys.argv[1])
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    shared = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}[capability] * 1024
    with (
        recording() as launches,
        mock.patch.object(experts, "shared_bytes", lambda x: shared),
    ):
        launch_everything(dtype)
    done = set()
    for launch in launches:
        name = launch.kernel.__name__
        if "FAST" in launch.arguments:
            launch.arguments["FAST"] = capability >= 80
        constants = tuple(v for v in launch.arguments.values() if not hasattr(v, "shape"))
        if (name, constants) in done:
            continue
        done.add((name, constants))
        made = launch.compile(capability)
        if made.metadata.shared > shared:
            sys.exit(f"{name} wants {made.metadata.shared} bytes of shared memory of {shared}")
        print("compiled", name, made.metadata.shared, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
