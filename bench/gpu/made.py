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
    # A residual stream that each layer changes a little, and peaked answers, as after training:
    # with every weight alike, rounding grows through the layers until nothing is left to compare.
    spreads = {"embed_tokens": 1.0, "o_proj": 0.004, "lm_head": 0.06, "sinks": 0.5}
    spread = next((s for part, s in spreads.items() if part in name), 0.02)
    return made.normal_(0.0, spread)


def _experts(shape: Any, device: torch.device) -> Mxfp4Experts:
    hidden, middle = shape.hidden_size, shape.intermediate_size
    return Mxfp4Experts(
        _weights(shape.num_local_experts, 2 * middle, hidden, device, 120),
        _weights(shape.num_local_experts, hidden, middle, device, 117),
        1.702,
        7.0,
    )


def _weights(
    experts: int, rows: int, columns: int, device: torch.device, scale: int
) -> ExpertWeights:
    groups = columns // 32
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, device=device)
    scales = torch.randint(
        scale - 1, scale + 2, (experts, rows, groups), dtype=torch.uint8, device=device
    )
    bias = torch.randn(experts, rows, device=device).mul_(0.02).bfloat16()
    return expert_weights(blocks, scales, bias)


def widened(held: ExpertWeights, dtype: torch.dtype) -> Tensor:
    """[experts, columns, rows] in `dtype`, as the stock module holds a projection."""
    experts = held.words.shape[0]
    return torch.stack([held.dequantized(e, dtype).T for e in range(experts)])
