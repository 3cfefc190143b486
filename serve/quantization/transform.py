"""What transformers is told about a plan's quantization.

Called by folder.py; layers of our own, which stay packed, are in packed.py and linear4.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.quantization.plan import Plan


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
