"""What transformers is told about a plan's quantization, in the configuration and beside it.

Called by folder.py; layers of our own, which stay packed, are in packed.py and linear4.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve.quantization.plan import Plan

TRITON_BITS = (2, 4, 8)


def stated_config(plan: Plan, config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """config.json as transformers shall read it: what our own layers hold is no quantization there,
    and gptqmodel is told which kernel to take."""
    if plan.method in ("awq", "gptq", "mxfp4"):
        return {key: value for key, value in config.items() if key != "quantization_config"}
    if plan.method == "gptqmodel":
        stored = config["quantization_config"]
        return {**config, "quantization_config": {**stored, "backend": _kernel(stored, device)}}
    return dict(config)


def _kernel(stored: Mapping[str, Any], device: str) -> str:
    """Left to choose, gptqmodel compiles C++ or CUDA in this process first (69 s on a CPU), even
    for kernels that it does not take then."""
    if str(stored["quant_method"]).lower() == "awq":
        return "torch_awq"
    bits = int(stored.get("bits") or 4)
    has_triton = device.startswith("cuda") and find_spec("triton") is not None
    return "gptq_triton" if has_triton and bits in TRITON_BITS else "gptq_torch"


def without_compiler(model: Any) -> None:
    """gptqmodel has torch compile how its layers unpack: at the first request, for seconds, and on
    a CPU with a C++ compiler, without which no answer comes. The plain functions do the same."""
    for module in model.modules():
        module.__dict__.pop("dequantize_weight", None)


def quantization_options(
    plan: Plan, config: Mapping[str, Any], files: Sequence[Path]
) -> dict[str, Any]:
    """Keyword arguments for from_pretrained. Raises Refused."""
    import torch

    stored = (config.get("quantization_config") or {}).get("quant_method", "")
    if plan.method == "full" and stored == "mxfp4":
        from transformers.utils.quantization_config import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if plan.method == "bnb4":
        from transformers.utils.quantization_config import BitsAndBytesConfig

        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=getattr(torch, plan.dtype),
            ),
        }
    if plan.method in ("awq", "gptq", "mxfp4"):
        from serve.quantization.packed import packed_config

        return {"quantization_config": packed_config(files, config)}
    return {}
