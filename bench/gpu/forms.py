"""Every form of weights loaded on a GPU by the loader, against the CPU's float32 answer.

    python bench/gpu/forms.py

Makes tiny checkpoints, loads each as a user would, prints the largest difference of the logits and
the GPU memory that the weights take.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import loader
from serve.quantization.machine import Machine, free_memory
from serve.settings import from_env
from tests.tiny import tiny_gpt_oss, tiny_llama
from tests.tiny_quantized import quantized_llama


def load(folder: Path, work: Path, quant: str) -> object:
    settings = from_env(
        {"WORK_DIR": str(work), "MODEL_LOCAL_PATH": str(folder), "QUANT_TYPE": quant}
    )
    return loader.load(settings, lambda _: None, print)


def logits(loaded: object) -> torch.Tensor:
    ids = torch.arange(3, 40)[None].to(loaded.device)  # type: ignore[attr-defined]
    with torch.no_grad():
        return loaded.model(ids).logits.float().cpu()  # type: ignore[attr-defined, no-any-return]


def widen(packed: torch.nn.Module, plain: torch.nn.Module) -> None:
    """Give the plain model what bitsandbytes' 4-bit weights mean."""
    import bitsandbytes as bnb

    for name, module in packed.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            wide = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = wide.float().cpu()


def main() -> None:
    work = Path(tempfile.mkdtemp())
    awq, awq_plain = quantized_llama(work / "awq", "awq", group=64)
    gptq, gptq_plain = quantized_llama(work / "gptq", "gptq", act_order=True)
    oss = tiny_gpt_oss(work / "oss", mxfp4=True)
    plain = tiny_llama(work / "plain", hidden_size=128, intermediate_size=256)
    gpu = loader.this_machine
    for folder, quant, reference, reference_quant in (
        (awq, "awq", awq_plain, "full"),
        (gptq, "gptq", gptq_plain, "full"),
        (oss, "mxfp4", oss, "full"),
        (oss, "auto", oss, "full"),
        (plain, "full", plain, "full"),
        (plain, "bnb4", plain, "full"),
    ):
        held = load(folder, work, quant)
        loader.this_machine = lambda: Machine("cpu", free_memory(), "the CPU")
        meant = load(reference, work, reference_quant)
        loader.this_machine = gpu
        if quant == "bnb4":
            widen(held.model, meant.model)  # type: ignore[attr-defined]
        exact = logits(meant)
        off = ((logits(held) - exact).abs().max() / exact.abs().max()).item()
        kind = f"{held.quantization} {held.dtype} {held.device}"  # type: ignore[attr-defined]
        print(f"{quant:6} held as {kind:30} off by {off:.4f} of the largest logit", flush=True)


if __name__ == "__main__":
    main()
