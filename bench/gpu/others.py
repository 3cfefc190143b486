"""What gpt_oss.py compares with or checks beside its own path: stock transformers, dense models,
4-bit layers, and loading from disk."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from bench.gpu import made
from bench.gpu.timing import graph_microseconds, relative_error

DEVICE = torch.device("cuda")


def stock(model: Any) -> None:
    """transformers' generate() offline: weights widened to bf16, grouped_mm experts, eager
    attention (the best of its configurations here; see PERF notes in README.md)."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    kept = [layer.mlp.experts for layer in model.model.layers]
    model.config._experts_implementation = "grouped_mm"
    model.set_attn_implementation("eager")
    for layer, held in zip(model.model.layers, kept, strict=True):
        with torch.device("meta"):
            wide = GptOssExperts(model.config)
        for name, weights in (("gate_up_proj", held.gate_up), ("down_proj", held.down)):
            parameter = nn.Parameter(made.widened(weights, torch.bfloat16), False)
            setattr(wide, name, parameter)
            setattr(wide, f"{name}_bias", nn.Parameter(weights.bias, False))
        layer.mlp.experts = wide
    for streams in (1, 8):
        ids = torch.randint(1, model.config.vocab_size, (streams, 128), device=DEVICE)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        model.generate(ids, max_new_tokens=4, **options)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=64, min_new_tokens=64, **options)
        torch.cuda.synchronize()
        rate = streams * 64 / (time.perf_counter() - begin)
        held_gib = torch.cuda.memory_allocated() / 2**30
        print(f"transformers generate(), {streams} streams: {rate:.1f} tok/s, {held_gib:.0f} GiB")
    for layer, held in zip(model.model.layers, kept, strict=True):
        layer.mlp.experts = held


def load(model: Any) -> None:
    """Write the model as a published checkpoint, load it as the app does, and check that it is the
    same."""
    from serve.quantization.folder import load_weights, read_config, read_weights
    from serve.quantization.plan import Plan

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(model, folder)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        memory = psutil.Process().memory_info()
        begin = time.perf_counter()
        size = read_weights(folder).stored_bytes
        again = load_weights(
            folder, read_config(folder), Plan("mxfp4", "bfloat16", size), "cuda", vision=False
        )
        torch.cuda.synchronize()
        taken = time.perf_counter() - begin
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30
        after = psutil.Process().memory_info()
        own = (after.rss - after.shared - memory.rss + memory.shared) / 2**30
        same = all(
            torch.equal(a.data, b.data)
            for a, b in zip(model.parameters(), again.parameters(), strict=True)
        ) and all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers(), strict=True))
        print(
            f"loaded {size / 2**30:.2f} GiB from a warm folder in {taken:.1f} s, the same: {same}; "
            f"peak {peak:.2f} GiB on the GPU, the process's own memory grew by {own:.2f} GiB"
        )


def write(model: Any, folder: Path) -> None:
    """The published layout: a file a layer's experts, one for the rest, and the index."""
    from safetensors.torch import save_file

    config = model.config.to_dict()
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    weight_map: dict[str, str] = {}
    for number, layer in enumerate(model.model.layers):
        tensors = {}
        for name, held in (
            ("gate_up_proj", layer.mlp.experts.gate_up),
            ("down_proj", layer.mlp.experts.down),
        ):
            groups = held.columns // 32
            prefix = f"model.layers.{number}.mlp.experts.{name}"
            blocks = held.words.view(torch.uint8).unflatten(-1, (groups, 16))
            tensors[f"{prefix}_blocks"] = blocks.cpu()
            tensors[f"{prefix}_scales"] = held.scales[..., :groups].contiguous().cpu()
            tensors[f"{prefix}_bias"] = held.bias.cpu()
        file = f"layer{number:02}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    rest = {n: p.data.contiguous().cpu() for n, p in model.named_parameters()}
    save_file(rest, folder / "rest.safetensors", {"format": "pt"})
    weight_map |= dict.fromkeys(rest, "rest.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def dense(_: Any) -> None:
    """A stock Llama in float32 through the engine (our attention, graphs) against generate()."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from serve.engine.config import EngineConfig
    from serve.engine.engine import create_engine
    from serve.engine.face import BlockingMailbox, GenerationRequest, Prompt, Tokens
    from serve.values import Sampling

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=512, intermediate_size=1024, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, vocab_size=32000, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE).eval()
    prompts = [torch.randint(1, 32000, (n,)).tolist() for n in (1, 33, 200, 700)]
    wanted = [
        model.generate(
            torch.tensor([ids], device=DEVICE), max_new_tokens=40, min_new_tokens=40,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]  # fmt: skip
    options = EngineConfig(max_running=8, kv_cache_gb=1.0, prefill_chunk=256)
    engine = create_engine(model, eos_ids=[0], context_length=2048, device=DEVICE, config=options)
    boxes = [BlockingMailbox() for _ in prompts]
    sampling = Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
    for ids, box in zip(prompts, boxes, strict=True):
        engine.submit(GenerationRequest(Prompt(tuple(ids)), sampling), box)
    found = [[i for m in box if isinstance(m, Tokens) for i in m.ids] for box in boxes]
    engine.close()
    print("a stock Llama through the engine gives generate()'s ids:", found == wanted)


def w4_layers(_: Any = None) -> None:
    """4-bit layers of Qwen2.5-14B's shapes: ours packed and widened, torch's int4 product, bf16."""
    for outputs, inputs in ((13824, 5120), (5120, 13824), (5120, 5120), (1024, 5120)):
        w4_layer(outputs, inputs, (1, 8, 64, 256, 512, 2048) if outputs > 5120 else (1, 8, 64))


def w4_layer(outputs: int, inputs: int, counts: tuple[int, ...]) -> None:
    from serve.engine.kernels import w4

    held = w4.W4(
        torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=DEVICE),
        torch.rand(inputs // 128, outputs, device=DEVICE) * 0.01,
        torch.randn(inputs // 128, outputs, device=DEVICE) * 0.05,
        128,
    )
    turned = (held.packed << 4 | held.packed >> 4).contiguous()  # torch wants the first one high
    theirs = torch._convert_weight_to_int4pack(turned, 8)
    pairs = torch.stack((held.scales, held.offsets + 8 * held.scales), -1).bfloat16()
    wide, exactly = held.dequantized(torch.bfloat16), held.dequantized(torch.float64)
    for tokens in counts:
        x = torch.randn(tokens, inputs, device=DEVICE).bfloat16()
        exact = x.double() @ exactly.T
        ways = {
            "packed": lambda x=x: w4.product(x, held),
            "widened": lambda x=x: w4.widened_product(x, held),
            "torch int4": lambda x=x: torch._weight_int4pack_mm(x, theirs, 128, pairs),
            "bf16": lambda x=x: nn.functional.linear(x, wide),
        }
        told = [
            f"{name} {graph_microseconds([way] * 4):.1f} us err {relative_error(way(), exact):.1e}"
            for name, way in ways.items()
        ]
        print(f"w4 {tokens} x {inputs} x {outputs}: " + ", ".join(told), flush=True)
