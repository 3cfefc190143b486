"""An MXFP4 gpt-oss checkpoint onto a device as it is stored: no second copy, no wider weights.

The folder is the published layout: config.json and safetensors files (with an index when there are
several) in which each layer's experts are `gate_up_proj_blocks` / `_scales` / `_bias` and
`down_proj_…`; everything else is named like the stock model's parameters. The stock model is built
without memory, then each tensor goes from the mapped file straight to the device. The loader calls
`load_gpt_oss_mxfp4`; `is_mxfp4` tells it when to. Knows no downloads and no settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serve.engine.kernels.experts import ExpertWeights, Mxfp4Experts, expert_weights

Report = Callable[[int, int], None]
_EXPERTS = ".mlp.experts."


def is_mxfp4(folder: Path) -> bool:
    """Whether the folder holds gpt-oss with MXFP4 experts."""
    config = json.loads((folder / "config.json").read_text())
    method = (config.get("quantization_config") or {}).get("quant_method")
    return config.get("model_type") == "gpt_oss" and method == "mxfp4"


def resident_bytes(folder: Path) -> int:
    """What the weights will take on the device: what they take on disk."""
    return sum(file.stat().st_size for file in _files(folder))


def load_gpt_oss_mxfp4(
    folder: Path,
    device: torch.device,
    report: Report | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """GptOssForCausalLM in eval mode on `device`, its experts Mxfp4Experts.

    `dtype` of all other weights: bfloat16 when None, or float16 on a GPU older than compute
    capability 8.0. `report` gets bytes done and in all. Raises ValueError naming the tensors when
    the checkpoint lacks some or holds unknown ones.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig.from_pretrained(folder)
    config.quantization_config = None
    del config.quantization_config
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    dtype = dtype or _dtype(device)
    waiting: dict[str, dict[str, Tensor]] = {}
    missing = _expected(model)
    for name, tensor in _tensors(folder, device, report):
        if name not in missing:
            raise ValueError(f"{folder} holds a tensor {name} that gpt-oss does not have.")
        missing.discard(name)
        if _EXPERTS in name:
            layer, _, part = name.partition(_EXPERTS)
            _place_experts(model, layer, waiting.setdefault(layer, {}), part, tensor)
        else:
            _place(model, name, tensor.to(dtype))
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors, such as {min(missing)}.")
    return model.eval()


def _expected(model: Any) -> set[str]:
    """The checkpoint's names: the stock parameters, experts as blocks and scales."""
    names = set()
    for name, _ in model.named_parameters():
        if _EXPERTS in name and not name.endswith("_bias"):
            names |= {f"{name}_blocks", f"{name}_scales"}
        else:
            names.add(name)
    return names


def _tensors(
    folder: Path, device: torch.device, report: Report | None
) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    total, done = resident_bytes(folder), 0
    for file in _files(folder):
        with safe_open(file, framework="pt", device=str(device)) as held:
            for name in held.keys():
                tensor = held.get_tensor(name)
                yield name, tensor
                done += tensor.nbytes
                if report is not None:
                    report(min(done, total), total)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [folder / name for name in names]
    return [folder / "model.safetensors"]


def _place(model: Any, name: str, tensor: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    shape = getattr(module, own).shape
    if tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} here; config.json says {tuple(shape)}.")
    setattr(module, own, nn.Parameter(tensor, requires_grad=False))


def _place_experts(
    model: Any, layer: str, parts: dict[str, Tensor], part: str, tensor: Tensor
) -> None:
    """Keep a part until its layer's six are there, then put the experts in the module's place."""
    parts[part] = tensor
    if len(parts) < 6:
        return
    mlp = model.get_submodule(f"{layer}.mlp")
    stock = mlp.experts
    mlp.experts = Mxfp4Experts(
        _projection(parts, "gate_up_proj"),
        _projection(parts, "down_proj"),
        getattr(stock, "alpha", 1.702),
        getattr(stock, "limit", 7.0),
    )
    parts.clear()


def _projection(parts: dict[str, Tensor], name: str) -> ExpertWeights:
    return expert_weights(parts[f"{name}_blocks"], parts[f"{name}_scales"], parts[f"{name}_bias"])


def _dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16
