"""An MXFP4 checkpoint loads as it is stored and computes what its widened weights compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from serve.engine.kernels import mxfp4
from serve.engine.kernels.checkpoint import is_mxfp4, load_gpt_oss_mxfp4, resident_bytes
from serve.engine.kernels.experts import Mxfp4Experts

CPU = torch.device("cpu")


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
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {name: file for file, own in shares.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_a_checkpoint_computes_exactly_what_its_widened_weights_compute(tmp_path: Path) -> None:
    stock = tiny()
    save(stock, tmp_path)
    assert is_mxfp4(tmp_path)
    seen: list[tuple[int, int]] = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    loaded = load_gpt_oss_mxfp4(tmp_path, CPU, report, torch.float32)
    loaded.set_attn_implementation("eager")
    ids = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    assert isinstance(loaded.model.layers[0].mlp.experts, Mxfp4Experts)
    assert not any(p.is_meta for p in loaded.parameters())
    total = resident_bytes(tmp_path)
    assert seen == sorted(seen) and seen[-1][1] == total and 0.9 * total < seen[-1][0] <= total


def test_experts_keep_the_size_they_have_on_disk(tmp_path: Path) -> None:
    save(tiny(), tmp_path)
    held = load_gpt_oss_mxfp4(tmp_path, CPU).model.layers[0].mlp.experts
    assert held.gate_up.words.nbytes == 4 * 128 * 64 // 2
    assert held.gate_up.words.dtype == torch.int16


def test_a_checkpoint_that_lacks_a_tensor_names_it(tmp_path: Path) -> None:
    save(tiny(), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    kept = {k: v for k, v in json.loads(index.read_text())["weight_map"].items() if v[0] == "a"}
    index.write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors, such as "):
        load_gpt_oss_mxfp4(tmp_path, CPU)


def test_only_gpt_oss_with_mxfp4_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    assert not is_mxfp4(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "mxfp4"}}'
    )
    assert not is_mxfp4(tmp_path)
