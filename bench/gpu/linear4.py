"""4-bit linear layers on a GPU: every way in which Linear4 computes, checked and timed.

    python bench/gpu/linear4.py

Prints one row a shape and number of tokens: microseconds of torch's int4 product, of a bf16 product
of the widened weights, and the largest error against float64 of what the codes mean.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from serve.quantization.linear4 import Linear4, Packing

SHAPES = ((3584, 4608), (3584, 3584), (3584, 18944), (18944, 3584))  # Qwen2.5-7B's


def filled(inputs: int, outputs: int, packing: Packing) -> Linear4:
    """A layer with random codes on the GPU, as it is after loading."""
    with torch.device("cuda"):
        layer = Linear4(inputs, outputs, False, packing)
        for name in ("qweight", "qzeros"):
            getattr(layer, name).random_(-(2**31), 2**31 - 1)
        layer.scales = torch.rand(layer.scales.shape, dtype=torch.float16) * 0.02 + 0.001
        if packing.method == "gptq":
            groups = torch.arange(inputs, dtype=torch.int32) // packing.group
            layer.g_idx = groups[torch.randperm(inputs)]
    return layer


def meant(layer: Linear4, packing: Packing) -> torch.Tensor:
    """float64 [out, in], by the formats' own arithmetic."""
    codes, zeros, group_of = layer._unpacked()
    if group_of is None:
        group_of = torch.arange(layer.in_features, device="cuda") // packing.group
    scales = layer.scales.double().T
    return (codes.double() - zeros.double()[:, group_of]) * scales[:, group_of]


def microseconds(work: object, rounds: int = 50) -> float:
    for _ in range(5):
        work()  # type: ignore[operator]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        work()  # type: ignore[operator]
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000 / rounds


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for packing in (Packing("awq", 128), Packing("gptq", 128, 4, 1), Packing("awq", 16)):
        for inputs, outputs in SHAPES:
            layer = filled(inputs, outputs, packing)
            exact = meant(layer, packing)
            layer.settle()
            plain = exact.bfloat16()
            for tokens in (1, 8, 64, 512):
                x = torch.randn((tokens, inputs), device="cuda", dtype=torch.bfloat16)
                wanted = x.double() @ exact.T
                error = ((layer(x).double() - wanted).abs().max() / wanted.abs().max()).item()
                ours = microseconds(lambda layer=layer, x=x: layer(x))
                wide = microseconds(lambda plain=plain, x=x: x @ plain.T)
                kind = "int4" if layer._packed is not None else "widened"
                print(
                    f"{packing.method:5} g{packing.group:<4} {kind:7} {inputs:6} -> {outputs:6} "
                    f"{tokens:4} tokens: {ours:8.1f} us, bf16 {wide:8.1f} us, error {error:.1e}"
                )
                assert error < 0.02


if __name__ == "__main__":
    main()
