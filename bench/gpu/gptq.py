"""Weights that gptqmodel's layers hold, loaded by the loader, against what they mean.

    python bench/gpu/gptq.py

Needs requirements-gptq.txt. Makes tiny checkpoints of every width, loads each as a user would, on
the GPU if there is one, and prints the largest difference of the logits from the CPU's float32
answer, whether the engine says greedily what generate() says, and seconds to the first answer. Then
a larger model in 8 bits: milliseconds for prompts and single tokens beside 16 bits.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import loader
from bench.gpu.forms import load, logits
from serve.engine.config import EngineConfig
from serve.engine.engine import create_engine
from serve.engine.face import BlockingMailbox, GenerationRequest, Prompt, Tokens
from serve.quantization.machine import Machine, free_memory
from serve.values import Sampling
from tests.tiny_quantized import quantized_llama

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gptq", {"bits": 2}),
    ("gptq", {"bits": 3}),
    ("gptq", {"bits": 3, "act_order": True, "form": "gptq_v2"}),
    ("gptq", {"bits": 8}),
    ("gptq", {"bits": 8, "act_order": True}),
    ("gptq", {"bits": 8, "group": -1}),
    ("awq", {"bits": 3}),
    ("awq", {"bits": 8}),
)
PROMPTS = tuple(tuple(range(3 + i, 40 - i)) for i in range(5))


def on_the_cpu(folder: Path, work: Path) -> Any:
    gpu = loader.this_machine
    loader.this_machine = lambda: Machine("cpu", free_memory(), "the CPU")
    try:
        return load(folder, work, "full")
    finally:
        loader.this_machine = gpu


def said_by_engine(loaded: Any) -> list[list[int]]:
    engine = create_engine(
        loaded.model,
        eos_ids=loaded.eos_ids,
        context_length=loaded.context_length,
        device=loaded.device,
        config=EngineConfig(kv_cache_gb=0.5),
    )
    greedy = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
    mailboxes = [BlockingMailbox() for _ in PROMPTS]
    for prompt, mailbox in zip(PROMPTS, mailboxes, strict=True):
        engine.submit(GenerationRequest(Prompt(prompt), greedy), mailbox)
    said = [[i for m in box if isinstance(m, Tokens) for i in m.ids] for box in mailboxes]
    engine.close()
    return said


def said_by_generate(loaded: Any) -> list[list[int]]:
    said = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=loaded.device)
        made = loaded.model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        said.append(made[0, len(prompt) :].tolist())
    return said


def check(method: str, options: dict[str, Any], work: Path) -> None:
    packed, plain = quantized_llama(work, method, **options)
    began = time.monotonic()
    held: Any = load(packed, work, "auto")
    found = logits(held)
    taken = time.monotonic() - began
    exact = logits(on_the_cpu(plain, work))
    off = ((found - exact).abs().max() / exact.abs().max()).item()
    kind = type(held.model.model.layers[0].mlp.up_proj).__name__
    theirs = said_by_generate(held)
    ours = said_by_engine(held)  # gives the model attention of its own
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(
        f"{method} {options}: {kind} {held.dtype} {held.device}, off by {off:.5f} of the largest "
        f"logit, engine and generate() agree on {same} of {len(ours)}, first answer {taken:.1f} s",
        flush=True,
    )


def milliseconds(model: Any, device: Any, tokens: int) -> float:
    ids = torch.randint(3, 90, (1, tokens), device=device)
    with torch.inference_mode():
        for _ in range(3):
            model(ids, use_cache=False)
        torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(20):
            model(ids, use_cache=False)
        torch.cuda.synchronize()
    return (time.monotonic() - began) / 20 * 1e3


def cost(work: Path) -> None:
    """4 layers of a 2B model's size: what gptqmodel's unpacking costs beside 16 bits."""
    sizes = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8}
    packed, plain = quantized_llama(
        work, "gptq", bits=8, group=128, num_hidden_layers=4, intermediate_size=8192, **sizes
    )
    held: Any = load(packed, work, "auto")
    wide: Any = load(plain, work, "full")
    for tokens in (1, 8, 64, 512):
        packed_ms = milliseconds(held.model, held.device, tokens)
        plain_ms = milliseconds(wide.model, wide.device, tokens)
        print(f"8 bits, {tokens} tokens: {packed_ms:.2f} ms; 16 bits: {plain_ms:.2f}", flush=True)


def main() -> int:
    """Exit code 1 if a case failed."""
    failed = 0
    for method, options in CASES:
        try:
            check(method, options, Path(tempfile.mkdtemp()))
        except Exception as error:  # the other cases are still worth knowing
            print(f"{method} {options}: FAILED {type(error).__name__}: {error}", flush=True)
            failed += 1
    if torch.cuda.is_available():
        cost(Path(tempfile.mkdtemp()))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
