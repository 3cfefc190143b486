"""Compile the kernels without a GPU: record what the launchers launch, then compile it ahead of
time for a named compute capability."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
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
