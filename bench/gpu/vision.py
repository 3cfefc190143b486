"""Models that see, on one GPU: checks the families against generate, then times a 7B shape.

    python bench/gpu/vision.py [check|speed|small ...]

`check`: tiny random models of every family, float32, the engine's ids beside model.generate's.
`speed`: Qwen2.5-VL-7B's shape with made weights, one picture of about 970 tokens and 128 new ids a
request, for 1, 8 and 32 requests at once, beside model.generate on the same batch.
`small`: the same measurement of a tiny model, to try this script where there is no GPU.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from serve.engine.config import EngineConfig
from serve.engine.engine import PagedEngine
from serve.engine.face import (
    BlockingMailbox,
    Ended,
    GenerationRequest,
    Prompt,
    Tokens,
)
from serve.engine.seeing import create_seeing_engine
from serve.formats.images import VisionInputs
from serve.values import Sampling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEW = 128
TEXT = 40


@dataclass(frozen=True)
class Asked:
    """One request: ids with room for its picture, and the picture as a processor would give it."""

    ids: tuple[int, ...]
    pixels: torch.Tensor
    grid: torch.Tensor

    @property
    def prompt(self) -> Prompt:
        key = str(hash(self.pixels.sum().item())).encode()
        tensors = {"pixel_values": self.pixels, "image_grid_thw": self.grid}
        return Prompt(self.ids, {"vision": VisionInputs(tensors, (key,))}, key)


def made_model(small: bool) -> Any:
    """Random weights of the real shape, on the device."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: dict[str, Any] = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                            "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
        "out_hidden_size": 3584, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    if small:
        rope = text["rope_parameters"] | {"mrope_section": [8, 12, 12]}
        text |= {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": rope,
        }
        vision |= {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128,
                   "out_hidden_size": 256, "fullatt_block_indexes": [1]}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    kind = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(DEVICE):
        before = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        torch.set_default_dtype(before)
    return model


def asked(model: Any, count: int, grid: tuple[int, int], seed: int) -> list[Asked]:
    """Requests that share nothing with those of another seed, so that no cache knows them."""
    config, height, width = model.config, *grid
    found = []
    for number in range(count):
        noise = torch.Generator().manual_seed(1000 * seed + number)
        words = torch.randint(1000, 100_000, (2 * TEXT,), generator=noise).tolist()
        shown = [config.image_token_id] * (height * width // 4)
        ids = [*words[:TEXT], config.vision_start_token_id, *shown, config.vision_end_token_id]
        pixels = torch.randn(height * width, 3 * 2 * 14 * 14, generator=noise)
        found.append(Asked((*ids, *words[TEXT:]), pixels, torch.tensor([[1, height, width]])))
    return found


@torch.inference_mode()
def generated(model: Any, requests: Sequence[Asked], new: int) -> float:
    """Seconds that model.generate takes for the batch."""
    ids = torch.tensor([one.ids for one in requests], device=DEVICE)
    types = (ids == model.config.image_token_id).int()
    began = time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types,
        pixel_values=torch.cat([one.pixels for one in requests]).to(DEVICE),
        image_grid_thw=torch.cat([one.grid for one in requests]).to(DEVICE),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def answered(engine: PagedEngine, requests: Sequence[Asked], new: int) -> tuple[float, float]:
    """Seconds to the last id of all, and the mean to each one's first."""
    options = Sampling(temperature=0.0, max_tokens=new, ignore_eos=True)
    began = time.perf_counter()
    boxes = []
    for one in requests:
        boxes.append(BlockingMailbox())
        engine.submit(GenerationRequest(one.prompt, options), boxes[-1])
    firsts = []
    for box in boxes:
        for message in box:
            if isinstance(message, Ended):
                assert message.completion_tokens == new, message
                firsts.append(message.first_token_seconds)
    return time.perf_counter() - began, sum(firsts) / len(firsts)


def speed(small: bool = False) -> None:
    """Every count twice, each time with pictures and words of its own."""
    model = made_model(small)
    weights = sum(p.numel() for p in model.parameters()) / 1e9
    new, grid, counts = (16, (8, 12), (1, 4)) if small else (NEW, (54, 72), (1, 8, 32))
    print(f"{type(model).__name__}, {weights:.2f} G weights, {grid} patches a picture", flush=True)
    generated(model, asked(model, 1, grid, 1), 4)
    stock = {count: generated(model, asked(model, count, grid, 2), new) for count in counts}
    engine = create_seeing_engine(
        model,
        eos_ids={0},
        context_length=4096 if not small else 512,
        device=DEVICE,
        config=EngineConfig(kv_cache_gb=0.1 if small else 16.0),
    )
    try:
        answered(engine, asked(model, 5, grid, 3), 4)
        for go, count in ((go, count) for go in (1, 2) for count in counts):
            requests = asked(model, count, grid, 100 * go + count)
            seconds, first = answered(engine, requests, new)
            print(
                f"{count} requests, go {go}: engine {count * new / seconds:.0f} tok/s, mean time "
                f"to first id {1000 * first:.0f} ms; generate {count * new / stock[count]:.0f} "
                f"tok/s; {stock[count] / seconds:.2f} times as fast",
                flush=True,
            )
    finally:
        engine.close()


def check() -> None:
    """Every family's ids, several requests at once, beside generate's one by one."""
    from tests.seeing import ANSWER, Seeing, conversations, format_of, submitted
    from tests.tiny_vision import FAMILIES

    torch.backends.cuda.matmul.allow_tf32 = False
    for name, make in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            seeing = Seeing(Path(folder), make)
            expected = [seeing.expected(one) for one in conversations()]
            model = seeing.fresh_model().to(DEVICE)
            engine = create_seeing_engine(
                model,
                eos_ids={int(model.generation_config.eos_token_id)},
                context_length=512,
                device=DEVICE,
                config=EngineConfig(kv_cache_gb=0.1, prefill_chunk=64, block_size=16),
            )
            form = format_of(seeing.processor, model)
            boxes = [submitted(engine, form, one) for one in conversations()]
            found = [[i for m in box if isinstance(m, Tokens) for i in m.ids] for box in boxes]
            engine.close()
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        print(f"{name}: {same} of {len(expected)} answers of {ANSWER} ids equal", flush=True)


if __name__ == "__main__":
    for work in sys.argv[1:] or ("check", "speed"):
        {"check": check, "speed": speed, "small": lambda: speed(small=True)}[work]()
