"""Tiny AWQ and GPTQ checkpoints, packed here as those formats' own tools pack them, beside the
plain checkpoint of what they mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import tiny_llama

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that nibble i of an AWQ word holds


def quantized_llama(
    folder: Path,
    method: str,
    *,
    group: int = 32,
    act_order: bool = False,
    form: str = "gptq",
    bits: int = 4,
    **sizes: int,
) -> tuple[Path, Path]:
    """(packed, plain): the plain one has exactly the packed one's weights, in float32."""
    sizes = {"intermediate_size": 128, **sizes}
    plain, packed = tiny_llama(folder / "plain", **sizes), folder / "packed"
    shutil.copytree(plain, packed)
    weights = load_file(plain / "model.safetensors")
    meant, stored = {}, {}
    for number, (name, weight) in enumerate(weights.items()):
        if ".self_attn." in name or ".mlp." in name:
            order = _order(weight.shape[1], act_order, number)
            codes, scales, zeros, group_of = _quantize(weight, group, order, 2**bits - 1)
            meant[name] = ((codes - zeros[:, group_of]) * scales[:, group_of]).float()
            stem = name.removesuffix("weight")
            packing = _awq if method == "awq" else _gptq
            tensors = packing(codes, zeros, form, bits)
            stored |= {stem + key: tensor for key, tensor in tensors.items()}
            stored[stem + "scales"] = scales.T.half().contiguous()
            if method == "gptq":
                stored[stem + "g_idx"] = group_of.int()
        else:
            meant[name] = stored[name] = weight
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": method,
        "bits": bits,
        "group_size": group,
        **({"version": "gemm", "zero_point": True} if method == "awq" else {}),
        **({"desc_act": act_order, "checkpoint_format": form} if method == "gptq" else {}),
    }
    (packed / "config.json").write_text(json.dumps(config))
    return packed, plain


def _order(inputs: int, act_order: bool, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(inputs, generator=generator) if act_order else torch.arange(inputs)


def _quantize(
    weight: Tensor, group: int, order: Tensor, top: int = 15
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes [out, in], scales and zero points [out, groups], each input's group [in]."""
    outputs, inputs = weight.shape
    size = inputs if group < 0 else group
    groups = weight[:, order].unflatten(1, (-1, size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / top).half().float().clamp_min(1e-4)
    zeros = (-low / scales).round().clamp(0, top)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, top)
    group_of = torch.empty(inputs, dtype=torch.long)
    group_of[order] = torch.arange(inputs) // size
    back = torch.empty_like(order)
    back[order] = torch.arange(inputs)
    return codes.reshape(outputs, inputs)[:, back], scales, zeros, group_of


def _words(numbers: Tensor, bits: int = 4) -> Tensor:
    """[rows, n * 32 / bits] numbers -> int32 [rows, n]: their bits one after another, the lowest
    first. Where 32 is no multiple of `bits`, a number may lie across two words."""
    stream = (numbers.long().unsqueeze(-1) >> torch.arange(bits)) & 1
    words = (stream.flatten(1).unflatten(1, (-1, 32)) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _awq(codes: Tensor, zeros: Tensor, _: str, bits: int) -> dict[str, Tensor]:
    """Only 4 bits have AWQ's own order of columns."""

    def packed(rows: Tensor) -> Tensor:
        order = list(AWQ_COLUMNS if bits == 4 else range(8))
        return _words(rows.unflatten(1, (-1, 8))[..., order].flatten(1), bits)

    return {"qweight": packed(codes.T), "qzeros": packed(zeros.T)}


def _gptq(codes: Tensor, zeros: Tensor, form: str, bits: int) -> dict[str, Tensor]:
    stored = (zeros - (1 if form == "gptq" else 0)) % 2**bits
    return {"qweight": _words(codes, bits).T.contiguous(), "qzeros": _words(stored.T, bits)}
