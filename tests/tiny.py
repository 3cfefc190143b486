"""Tiny random models on disk, for tests: real configs, real tokenizers, real chat templates.

`tiny_model` takes any transformers config of a causal model; `tiny_llama`, `tiny_gpt_oss` (plain or
MXFP4, with harmony's special tokens) and `tiny_qwen3` are its common uses. Weights are drawn wide
enough that greedy decoding has clear winners. Everything is deterministic in `seed`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXT = """
The capital of France is Paris. The capital of Japan is Tokyo. A quick brown fox jumps over the lazy
dog, and the dog does not mind at all. What is the weather like today? It is sunny and 21 degrees.
Write a short poem about the sea. The sea is wide, the sea is deep, it sings the sailors all to
sleep. {"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}} def add(a: int, b:
int) -> int: return a + b. for i in range(10): print(i). Let me think about this step by step.
First,
second, third. Numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000. 巴黎是法国的首都。今天天气很好。你好,世界!
Straße, naïve, façade, déjà vu. Привет, мир. <think> </think> <tool_call> </tool_call>
"""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def tiny_tokenizer(
    special: Sequence[str] = CHATML_TOKENS,
    template: str | None = CHATML,
    eos: str = "<|im_end|>",
    size: int = 400,
) -> Any:
    """A byte-level BPE trained on TEXT; the special tokens have the last ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    bpe.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        pad_token=special[0],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(folder: Path, config: Any, tokenizer: Any | None = None, *, seed: int = 0) -> Path:
    """Save a random model of `config` with its tokenizer (ChatML by default) into `folder`.

    `config.vocab_size` is set to the tokenizer's size, `eos_token_id` to its end token.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer or tiny_tokenizer()
    config.vocab_size = len(tokenizer)
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(0.0, 0.7 if "embed" in name else weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llama(
    folder: Path, *, seed: int = 0, template: str | None = CHATML, **config: Any
) -> Path:
    """A Llama of 2 layers, 4 heads over 2 KV heads, 64 wide, with a context of 512 tokens."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return tiny_model(
        folder, LlamaConfig(**(sizes | config)), tiny_tokenizer(template=template), seed=seed
    )


def tiny_qwen3(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A Qwen3 (query and key norms) of the same size."""
    from transformers import Qwen3Config

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    return tiny_model(folder, Qwen3Config(**(sizes | config)), seed=seed)


def tiny_gpt_oss(
    folder: Path,
    *,
    mxfp4: bool = False,
    seed: int = 0,
    template: str | None = HARMONY,
    **config: Any,
) -> Path:
    """A gpt-oss of 2 layers (one sliding, one full), 4 experts of which 2 run, 64 wide.

    With `mxfp4` the experts are saved as 4-bit blocks and scales under the names that
    openai/gpt-oss-20b has, and config.json says so.
    """
    from transformers import GptOssConfig

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "max_position_embeddings": 1024,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 128,
            "truncate": False,
        },
    }
    tokenizer = tiny_tokenizer(HARMONY_TOKENS, template, eos="<|return|>")
    saved = tiny_model(folder, GptOssConfig(**(sizes | config)), tokenizer, seed=seed)
    _end_gpt_oss_like_the_real_one(saved, tokenizer)
    if mxfp4:
        _store_experts_as_mxfp4(saved)
    return saved


def _end_gpt_oss_like_the_real_one(folder: Path, tokenizer: Any) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|return|>", "<|endoftext|>", "<|call|>"])
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))


def _store_experts_as_mxfp4(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(path).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = mxfp4(weight)
        else:
            stored[name] = weight.bfloat16()
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (folder / "config.json").write_text(json.dumps(config))


def mxfp4(weight: Any) -> tuple[Any, Any]:
    """Quantize [experts, in, out] to blocks [experts, out, in / 32, 16] and scales [experts, out,
    in / 32], both uint8: E2M1 values, two to a byte (low nibble first), sharing a power of two,
    biased by 127, per 32 (OCP Microscaling Formats 1.0)."""
    import torch

    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp_min(2.0**-100))) - 2
    scaled = groups / torch.exp2(exponent).unsqueeze(-1)
    table = torch.tensor(FP4)
    nearest = (scaled.abs().unsqueeze(-1) - table).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks.contiguous(), (exponent + 127).to(torch.uint8)
