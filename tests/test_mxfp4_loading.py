"""An MXFP4 checkpoint loads as it is stored and computes what its widened weights compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from serve.engine.kernels import mxfp4
from serve.engine.kernels.experts import Mxfp4Experts
from serve.quantization.folder import load_weights, read_config
from serve.quantization.plan import Plan


def tiny(seed: int = 0) -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    config = GptOssConfig(
        num_hidden_layers=2, num_local_experts=4, vocab_size=97, hidden_size=64,
        intermediate_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=8, num_experts_per_tok=2, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def save(model: Any, folder: Path) -> None:
    """In the published layout, two files and an index; the model keeps the rounded weights."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".experts." not in name or name.endswith("_bias"):
            tensors[name] = parameter.data.clone()
            continue
        blocks, scales = mxfp4.quantize(parameter.data.transpose(1, 2))
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        wide = mxfp4.dequantize(blocks, scales, torch.float32)
        parameter.data = wide.transpose(1, 2).contiguous()
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    shares = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shares.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    index = {name: file for file, own in shares.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def load(folder: Path) -> Any:
    """As the app does on a CPU: float32 but for the experts."""
    plan = Plan("mxfp4", "float32", 0)
    return load_weights(folder, read_config(folder), plan, "cpu", vision=False)


def test_a_checkpoint_computes_exactly_what_its_widened_weights_compute(tmp_path: Path) -> None:
    stock = tiny()
    save(stock, tmp_path)
    loaded = load(tmp_path)
    loaded.set_attn_implementation("eager")
    ids = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    held = loaded.model.layers[0].mlp.experts
    assert isinstance(held, Mxfp4Experts)
    assert held.gate_up.words.nbytes == 4 * 128 * 64 // 2, "the size it has on disk"
