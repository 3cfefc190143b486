"""A tiny random Llama as a GGUF file, with blocks of several kinds and a chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.tiny import CHATML, CHATML_TOKENS, tiny_tokenizer

WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2


def tiny_gguf(path: Path, *, seed: int = 0, up: str = "Q4_1") -> Path:
    """Q4_1 linear weights, a Q8_0 embedding, F16 head and F32 norms, as quantizers write them."""
    import gguf

    tokenizer = tiny_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    kinds = [3 if token in CHATML_TOKENS else 1 for token, _ in vocabulary]
    writer.add_token_types(kinds)
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    writer.add_pad_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_chat_template(CHATML)
    for name, shape, kind in _tensors(len(vocabulary), up):
        drawn = np.random.default_rng([seed, len(name), *shape]).normal(size=shape)
        weight = (drawn * shape[-1] ** -0.5).astype(np.float32)
        kind_id = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(
            np.ones(shape, np.float32) if "norm" in name else weight, kind_id
        )
        writer.add_tensor(name, packed, raw_dtype=kind_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(tokenizer: object) -> list[str]:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]  # type: ignore[attr-defined]
    return [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]


def _tensors(vocabulary: int, up: str) -> list[tuple[str, tuple[int, ...], str]]:
    kv = WIDTH * KV_HEADS // HEADS
    found: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (vocabulary, WIDTH), "Q8_0"),
        ("output_norm.weight", (WIDTH,), "F32"),
        ("output.weight", (vocabulary, WIDTH), "F16"),
    ]
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        found += [
            (block + "attn_norm.weight", (WIDTH,), "F32"),
            (block + "ffn_norm.weight", (WIDTH,), "F32"),
            (block + "attn_q.weight", (WIDTH, WIDTH), "Q4_1"),
            (block + "attn_k.weight", (kv, WIDTH), "Q4_1"),
            (block + "attn_v.weight", (kv, WIDTH), "Q4_0"),
            (block + "attn_output.weight", (WIDTH, WIDTH), "Q4_1"),
            (block + "ffn_gate.weight", (INNER, WIDTH), "Q4_1"),
            (block + "ffn_up.weight", (INNER, WIDTH), up),
            (block + "ffn_down.weight", (WIDTH, INNER), "Q8_0"),
        ]
    return found
