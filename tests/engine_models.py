"""Tiny random models of the families the engine serves, and what it takes to drive one in a test.

Weights are drawn wide enough that greedy choices are clear. Used by tests/test_engine_*.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers

from serve.engine.config import EngineConfig
from serve.engine.engine import PagedEngine, create_engine
from serve.engine.face import BlockingMailbox, Ended, GenerationRequest, Message, Prompt, Tokens
from serve.values import Sampling

VOCABULARY = 320
EOS = 1
CPU = torch.device("cpu")

_SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=EOS,
)
_EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, head_dim=16)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "gemma3": ("Gemma3", dict(head_dim=16, sliding_window=12, sliding_window_pattern=2)),
    "mistral": ("Mistral", dict(sliding_window=16)),
    "phi3": ("Phi3", {}),
    "qwen3_moe": ("Qwen3Moe", _EXPERTS | dict(num_experts=4, moe_intermediate_size=48)),
    "gpt_oss": ("GptOss", _EXPERTS | dict(num_local_experts=4, sliding_window=16)),
}


def tiny(family: str, seed: int = 0) -> Any:
    """A model in eval mode, fp32, on the CPU."""
    torch.manual_seed(seed)
    name, special = FAMILIES[family]
    config_name = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
    options = _SHAPE | special
    if family == "gpt_oss":
        options["num_hidden_layers"] = 4
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or "sinks" in key:
                parameter.normal_(std=1.0 if "sinks" in key else 0.15)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 0
    return model


def engine_of(model: Any, **options: Any) -> PagedEngine:
    """A small engine: 4 tokens a block, 16 prompt tokens a step, one thread."""
    given: dict[str, Any] = dict(
        max_running=8, prefill_chunk=16, block_size=4, kv_cache_gb=0.01, threads=1
    )
    context_length = options.pop("context_length", 256)
    return create_engine(
        model,
        eos_ids=[EOS],
        context_length=context_length,
        device=CPU,
        config=EngineConfig(**(given | options)),
    )


def request(ids: Iterable[int], tenant: str = "", **sampling: Any) -> GenerationRequest:
    return GenerationRequest(Prompt(tuple(ids)), Sampling(**sampling), tenant=tenant)


def ids_of(messages: Iterable[Message], choice: int = 0) -> list[int]:
    return [
        token
        for message in messages
        if isinstance(message, Tokens) and message.choice == choice
        for token in message.ids
    ]


def ended(messages: list[Message]) -> Ended:
    """The one terminal message, checked to be the last and the only one."""
    assert [isinstance(m, Ended) for m in messages] == [False] * (len(messages) - 1) + [True]
    last = messages[-1]
    assert isinstance(last, Ended)
    return last


def run_all(engine: PagedEngine, requests: Iterable[GenerationRequest]) -> list[list[Message]]:
    """Submit all at once and read every mailbox to its end."""
    boxes = []
    for one in requests:
        box = BlockingMailbox()
        engine.submit(one, box)
        boxes.append(box)
    return [list(box) for box in boxes]


def run_one(engine: PagedEngine, one: GenerationRequest) -> list[Message]:
    return run_all(engine, [one])[0]
