"""A GGUF file as a dense model and its tokenizer: blocks are unpacked while they are read.

Llama files (the embedded default is one) are read once, with transformers' own block decoders; all
other architectures go through its general loader, which parses the file three times and takes
about ten times as long. Knows no hubs. Called by loader.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve.quantization.arrival import Arrived

LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_gguf(path: Path, dtype: Any, arrived: Arrived = lambda count: None) -> tuple[Any, Any]:
    """The model in `dtype` on the CPU, and its tokenizer with the file's own chat template;
    `arrived` is told the stored bytes of each tensor as it is unpacked (of other architectures at
    the end).

    Raises ValueError for a file or an architecture that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, names = read_gguf_metadata(str(path))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    if _is_plain_llama(metadata, names) and _has_known_blocks(path):
        return _load_llama(path, metadata, names, dtype, arrived), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    arrived(path.stat().st_size)  # this loader tells nothing on its way
    return model, tokenizer


def _is_plain_llama(metadata: dict[str, Any], names: tuple[str, ...]) -> bool:
    """True for the tensors and the rotary embedding of a Llama 2 or SmolLM, and nothing beside."""
    scaled = any(key.startswith("llama.rope.scaling") for key in metadata)
    known = all(_hf_name(name) is not None for name in names)
    is_mistral = "mistral" in str(metadata.get("general.name", "")).lower()
    return metadata["general.architecture"] == "llama" and known and not scaled and not is_mistral


def _has_known_blocks(path: Path) -> bool:
    """False for block kinds (Q5_0 is one) that only the general loader decodes."""
    from transformers.integrations.gguf.reader import GgufHeader

    try:
        GgufHeader.from_file(str(path))
    except ValueError:
        return False
    return True


def _hf_name(name: str) -> str | None:
    stem, _, suffix = name.rpartition(".")
    if suffix != "weight":
        return None
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        known = LLAMA_NAMES.get(part)
        return known and f"model.layers.{layer}.{known}.weight"
    known = LLAMA_NAMES.get(stem)
    return known and f"{known}.weight"


def _load_llama(
    path: Path, metadata: dict[str, Any], names: tuple[str, ...], dtype: Any, arrived: Arrived
) -> Any:
    from transformers import LlamaForCausalLM
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict

    config = _llama_config(metadata, names)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state: dict[str, Any] = {}
    for name, stored in load_gguf_state_dict(GgufHeader.from_file(str(path))).items():
        raw = stored[...]
        arrived(raw.nbytes)
        weight = _unpacked(raw, stored.ggml_type, dtype)
        part = name.split(".")[-2]
        if part in heads:
            weight = _rotary_halves(weight, heads[part])
        state[str(_hf_name(name))] = weight
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def _llama_config(metadata: dict[str, Any], names: tuple[str, ...]) -> Any:
    from transformers import LlamaConfig

    def field(key: str, default: Any = None) -> Any:
        return metadata.get(f"llama.{key}", default)

    heads = field("attention.head_count")
    return LlamaConfig(
        vocab_size=metadata.get("tokenizer.ggml.tokens", field("vocab_size")),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("attention.head_count_kv", heads),
        head_dim=field("rope.dimension_count", field("embedding_length") // heads),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def _unpacked(raw: Any, block: Any, dtype: Any) -> Any:
    from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

    if block not in GGML_BLOCK:
        return raw.to(dtype)
    return dequantize(raw, block).reshape(raw.shape[0], -1).to(dtype)


def _rotary_halves(weight: Any, heads: int) -> Any:
    """GGUF keeps a head's rotary pairs side by side; transformers keeps first and second halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
