"""gpt-oss models of the real shape with made weights: random, near a trained model's sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from serve.engine.kernels.experts import ExpertWeights, expert_weights
from serve.engine.kernels.gpt_oss import Mxfp4Experts


def config(layers: int = 24) -> Any:
    from transformers import GptOssConfig

    made = GptOssConfig(num_hidden_layers=layers, num_local_experts=32)
    made._attn_implementation = "eager"
    return made


def model(device: torch.device, layers: int = 24) -> Any:
    """The stock class on `device` in bf16, its experts in MXFP4; never larger than that."""
    from transformers import GptOssForCausalLM

    shape = config(layers)
    with torch.device("meta"):
        made = GptOssForCausalLM(shape)
    for layer in made.model.layers:
        layer.mlp.experts = _experts(shape, device)
    made.model.rotary_emb = type(made.model.rotary_emb)(shape).to(device)
    for name, parameter in list(made.named_parameters()):
        owner = made.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(_fill(name, parameter, device), False))
    made.lm_head.weight = nn.Parameter(_fill("lm_head", made.lm_head.weight, device), False)
    return made.eval()


def _fill(name: str, like: Tensor, device: torch.device) -> Tensor:
    made = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
    if "norm" in name:
        return made.uniform_(0.8, 1.2)
    return made.normal_(0.0, 0.5 if "sinks" in name else 0.02)


def _experts(shape: Any, device: torch.device) -> Mxfp4Experts:
    hidden, middle = shape.hidden_size, shape.intermediate_size
    return Mxfp4Experts(
        _weights(shape.num_local_experts, 2 * middle, hidden, device),
        _weights(shape.num_local_experts, hidden, middle, device),
        1.702,
        7.0,
    )


def _weights(experts: int, rows: int, columns: int, device: torch.device) -> ExpertWeights:
    groups = columns // 32
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, device=device)
    scales = torch.randint(119, 122, (experts, rows, groups), dtype=torch.uint8, device=device)
    bias = torch.randn(experts, rows, device=device).mul_(0.02).bfloat16()
    return expert_weights(blocks, scales, bias)


def widened(held: ExpertWeights) -> Tensor:
    """[experts, columns, rows] in bf16, as the stock module holds a projection."""
    experts = held.words.shape[0]
    return torch.stack([held.dequantized(e, torch.bfloat16).T for e in range(experts)])
