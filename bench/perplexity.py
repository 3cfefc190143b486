"""What a CPU's decode steps lose: perplexity of bench/perplexity_text.txt, one id a step.

The same ids through the stock model in float32, and through serve/engine/decoder.py as it serves:
with the weights' blocks found exactly where they can be, and with all weights rounded to 8 bits, as
those of a model that never was in blocks are.

Usage: .venv/bin/python -m bench.perplexity MODEL.gguf
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.engine import CPU, load
from serve.engine import blocks as block_forms
from serve.engine.config import EngineConfig
from serve.engine.engine import PagedEngine
from serve.engine.face import BlockingMailbox, GenerationRequest, Prompt
from serve.engine.runner import create_runner
from serve.values import Sampling

TEXT = Path(__file__).with_name("perplexity_text.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    gguf = parser.parse_args().gguf
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = tokenizer(TEXT.read_text()).input_ids
    exact = stock(load(gguf), ids)
    print(f"{len(ids)} tokens; stock model, float32: perplexity {exact:.4f}", flush=True)
    real = block_forms.blocks
    for name, blocks in (("blocks", real), ("rounded to 8 bits", partial(real, least_bits=8))):
        block_forms.blocks = blocks
        ours = decoded(load(gguf), ids)
        print(f"decode steps, {name}: {ours:.4f} ({100 * (ours / exact - 1):+.2f} %)", flush=True)


@torch.inference_mode()
def stock(model: Any, ids: list[int]) -> float:
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item())


def decoded(model: Any, ids: list[int]) -> float:
    """Every id is forced on a running request, so that the next step reads it as its own."""
    config = EngineConfig(kv_cache_gb=1.0, packs_weights=True).for_device("cpu")
    runner, cache, context = create_runner(model, CPU, context_length=4096, config=config)
    engine = PagedEngine(
        runner,
        cache,
        config,
        eos_ids=frozenset(),
        context_length=context,
        vocabulary=runner.vocabulary,
    )
    losses: list[float] = []
    real = runner.forward

    def forced(chunks: Any) -> torch.Tensor:
        logits = real(chunks).clone()
        target = ids[len(losses) + 1]
        losses.append(-logits.log_softmax(-1)[0, target].item())
        logits[:, target] = 1e9
        return logits

    runner.forward = forced  # type: ignore[method-assign]
    sampling = Sampling(temperature=0.0, max_tokens=len(ids) - 1, ignore_eos=True)
    engine.submit(GenerationRequest(Prompt((ids[0],)), sampling), BlockingMailbox())
    while len(losses) < len(ids) - 1:
        engine.step()
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
