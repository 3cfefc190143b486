"""Checkpoints whose weights stay packed: AWQ, GPTQ and gpt-oss' MXFP4, by transformers' own loading
with our layers put in before the weights come.

This is what transformers' extension point for quantizers is for: it maps names, places tensors and
fills buffers; we say which modules are replaced and what is done once their tensors are there.
Importing this module imports torch. Called by folder.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from serve.engine.kernels.experts import Mxfp4Experts, expert_weights
from serve.quantization.linear4 import Linear4, Packing, as_linear4
from serve.quantization.plan import Refused

METHOD = "kept_packed"


class KeptPacked(QuantizationConfigMixin):
    """What to replace: `names` of modules, and how their weights are packed (None: MXFP4)."""

    def __init__(self, names: Sequence[str], packing: Packing | None) -> None:
        self.quant_method: Any = METHOD
        self.names = tuple(names)
        self.packing = packing

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class Mxfp4Tensors(nn.Module):
    """Where the experts' tensors of the checkpoint arrive; Mxfp4Experts takes its place then."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        count, hidden, doubled = experts.gate_up_proj.shape
        self.alpha, self.limit = float(experts.alpha), float(experts.limit)
        for name, rows, columns in (
            ("gate_up_proj", doubled, hidden),
            ("down_proj", hidden, doubled // 2),
        ):
            groups = columns // 32
            blocks = torch.zeros((count, rows, groups, 16), dtype=torch.uint8)
            self.register_buffer(f"{name}_blocks", blocks)
            scales = torch.zeros((count, rows, groups), dtype=torch.uint8)
            self.register_buffer(f"{name}_scales", scales)
            self.register_buffer(f"{name}_bias", torch.zeros((count, rows)))

    def settled(self) -> Mxfp4Experts:
        held = [
            expert_weights(
                getattr(self, f"{name}_blocks"),
                getattr(self, f"{name}_scales"),
                getattr(self, f"{name}_bias"),
            )
            for name in ("gate_up_proj", "down_proj")
        ]
        return Mxfp4Experts(held[0], held[1], self.alpha, self.limit)


class PackedQuantizer(HfQuantizer):
    requires_calibration = False
    quantization_config: Any

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **{**options, "pre_quantized": True})

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        known = dict(model.named_modules())
        missing = [name for name in self.quantization_config.names if name not in known]
        if missing:
            raise ValueError(f"its packed tensors do not belong to this model ({missing[0]})")
        packing = self.quantization_config.packing
        for name in self.quantization_config.names:
            old = known[name]
            with torch.device("meta"):
                new = Mxfp4Tensors(old) if packing is None else as_linear4(old, packing)
            _put(model, name, new)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name in self.quantization_config.names:
            module = model.get_submodule(name)
            if isinstance(module, Linear4):
                module.settle()
            else:
                _put(model, name, module.settled())
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


def packed_config(files: Sequence[Path], config: Mapping[str, Any]) -> KeptPacked:
    """What of these weight files stays packed. Raises Refused for packings that are not read."""
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, PackedQuantizer)
    stored = config["quantization_config"]
    method = str(stored["quant_method"]).lower()
    suffix = ".gate_up_proj_blocks" if method == "mxfp4" else ".qweight"
    names = [name.removesuffix(suffix) for name in _tensor_names(files) if name.endswith(suffix)]
    if not names:
        raise Refused(
            f"its config says {method.upper()}, but its files hold no such tensors",
            "Fetch the model again, or name another.",
        )
    return KeptPacked(names, None if method == "mxfp4" else _packing(method, stored))


def _packing(method: str, stored: Mapping[str, Any]) -> Packing:
    bits = int(stored.get("bits") or stored.get("w_bit") or 4)
    version = str(stored.get("version") or "gemm").lower()
    group = int(stored.get("group_size") or stored.get("q_group_size") or 128)
    form = str(stored.get("checkpoint_format") or "gptq").lower()
    if bits != 4:
        raise Refused(
            f"its {method.upper()} weights have {bits} bits; 4 are read here", "Use 4 bits."
        )
    if method == "awq" and version != "gemm":
        raise Refused(f"its AWQ layout is {version!r}; 'gemm' is read here", "Use a GEMM one.")
    if method == "gptq" and form not in ("gptq", "gptq_v2"):
        raise Refused(f"its GPTQ layout is {form!r}; 'gptq' and 'gptq_v2' are read here", "")
    return Packing(method, group, bits, 1 if form == "gptq" and method == "gptq" else 0)


def _tensor_names(files: Sequence[Path]) -> list[str]:
    names: list[str] = []
    for file in files:
        with file.open("rb") as stored:
            (length,) = struct.unpack("<Q", stored.read(8))
            names += [name for name in json.loads(stored.read(length)) if name != "__metadata__"]
    return names


def _put(model: Any, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)
