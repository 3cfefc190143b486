"""What transformers is told about a plan's quantization.

Called by folder.py; the 4-bit layers of its own are in packed.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.quantization.plan import Plan, Refused


def quantization_options(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for from_pretrained. Raises Refused for what is not installed."""
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
            "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"},
        }
    if plan.method in ("awq", "gptq", "mxfp4"):
        raise Refused(f"{plan.method} weights are not loaded yet", "Set QUANT_TYPE=auto.")
    return {}
