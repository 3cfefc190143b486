"""Trains the vision chat model that the tests talk to (tests/models/tiny_vlm) from nothing.

A stock Llava of about 5 million weights: it names the colour and shape in a picture, reads numbers
of one or two digits (three with mistakes), and answers a few plain questions. Its pictures and talk
are made up by tests/tiny_pictures.py and tests/tiny_talk.py. A few minutes on one GPU:

    python scripts/make_tiny_vlm.py train OUT [--pictures N] [--steps N] [--seconds S]
    python scripts/make_tiny_vlm.py finish OUT    writes tests/models/tiny_vlm with a processor
    python scripts/make_tiny_vlm.py judge         asks the committed model about new pictures
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny_pictures, tiny_talk  # noqa: E402

FOLDER = ROOT / "tests" / "models" / "tiny_vlm"
SIDE, PATCH = 96, 12
IMAGE_IDS = (SIDE // PATCH) ** 2
LENGTHS = (128, 176, 256)  # ids of a conversation about none, one or two pictures
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
    "{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE of 512 ids, trained on the talk itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    chance = random.Random(0)
    said = []
    for _ in range(20_000):
        scenes = [tiny_pictures.scene(chance, 0.5, 3) for _ in range(chance.choice((0, 1, 1, 2)))]
        system, turns = tiny_talk.conversation(scenes, chance)
        said += [system or "", *(text for turn in turns for text in turn), "user", "assistant"]
    bpe = Tokenizer(models.BPE())
    # Digits one by one, as they are read.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512 - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(said, trainer)
    bpe.add_special_tokens(list(SPECIAL))
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        extra_special_tokens={"image_token": "<image>"},
    )
    made.chat_template = TEMPLATE
    return made


def fresh_model(words: Any) -> Any:
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_IDS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


# ---- what is shown and said ---------------------------------------------------------------------


def small(picture: Image.Image) -> np.ndarray:
    """As the image processor will do it: [side, side, 3] uint8."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def written(
    words: Any, system: str | None, turns: Sequence[tiny_talk.Turn], pictures: int, first: bool
) -> tuple[list[int], list[int]]:
    """Ids, and for each whether the model is to say it."""
    ids: list[int] = []
    taught: list[int] = []

    def add(text: str, is_taught: bool) -> None:
        new = words.encode(text, add_special_tokens=False)
        ids.extend(new)
        taught.extend([int(is_taught)] * len(new))

    if system is not None:
        add(f"<|im_start|>system\n{system}<|im_end|>\n", False)
    for number, (asked, answered) in enumerate(turns):
        shown = "<image>" * (IMAGE_IDS * pictures if number == 0 else 0)
        asked = shown + asked if first else asked + shown
        add(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n", False)
        add(f"{answered}<|im_end|>", True)
        add("\n", False)
    return ids, taught


def lesson(job: tuple[int, int, list[str]]) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """`count` pictures, and rows of (ids, taught, pictures' numbers) about none, one and two."""
    seed, count, faces = job
    torch.set_num_threads(1)
    chance = random.Random(seed)
    words = tokenizer()
    scenes = [tiny_pictures.scene(chance, 0.6, 3) for _ in range(count)]
    pixels = np.stack([small(tiny_pictures.draw(scene, chance, faces)) for scene in scenes])
    rows: list[list[np.ndarray]] = [[], [], []]
    for i, scene in enumerate(scenes):
        other = (i + 1) % count
        plan: list[tuple[list[Any], tuple[int, ...]]] = [([scene], (i, 0))] * 3
        plan += [([scene, scenes[other]], (i, other))] if i % 2 else [([], (0, 0))]
        for about, numbers in plan:
            system, turns = tiny_talk.conversation(about, chance)
            ids, taught = written(words, system, turns, len(about), chance.random() < 0.7)
            length = LENGTHS[len(about)]
            if len(ids) > length:
                continue
            pad = length - len(ids)
            row = [*ids, *[0] * pad, *taught, *[0] * pad, *numbers]
            rows[len(about)].append(np.array(row, np.int32))
    return pixels, rows


def lessons(count: int, faces: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pixels [count, side, side, 3] uint8 and the rows of each number of pictures."""
    each = 500
    jobs = [(1_000_000 + i, each, faces) for i in range(max(1, count // each))]
    pixels, rows = [], [[], [], []]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for number, (drawn, said) in enumerate(pool.imap(lesson, jobs)):
            pixels.append(drawn)
            for kind in range(3):
                found = np.stack(said[kind])
                found[:, -2:] += number * each
                rows[kind].append(found)
    return (
        torch.from_numpy(np.concatenate(pixels)),
        [torch.from_numpy(np.concatenate(kind)) for kind in rows],
    )


# ---- training -----------------------------------------------------------------------------------


def batches(
    pixels: torch.Tensor, rows: list[torch.Tensor], steps: int, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """ids [n, t], taught [n, t], pixels [n * pictures, 3, side, side] in -1 to 1 or None."""
    chance = torch.Generator().manual_seed(0)
    for _ in range(steps):
        kind = int(torch.multinomial(torch.tensor([0.06, 0.8, 0.14]), 1, generator=chance))
        count = size if kind < 2 else size // 2
        picked = torch.randint(len(rows[kind]), (count,), generator=chance)
        row = rows[kind][picked.to(rows[kind].device)].long()
        length = LENGTHS[kind]
        ids, taught, numbers = row[:, :length], row[:, length : 2 * length], row[:, 2 * length :]
        shown = None
        if kind:
            shown = pixels[numbers[:, :kind].reshape(-1)].permute(0, 3, 1, 2).float() / 127.5 - 1
        yield ids, taught, shown


def train(
    out: Path,
    pictures: int,
    steps: int,
    size: int,
    rate: float,
    seconds: float,
    faces: list[str],
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.time()
    words = tokenizer()
    pixels, rows = lessons(pictures, faces)
    pixels, rows = pixels.to(device), [kind.to(device) for kind in rows]
    print(f"{len(pixels)} pictures, {[len(k) for k in rows]} talks in {time.time() - start:.0f} s")
    model = fresh_model(words).to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights on {device}")
    plain = [p for p in model.parameters() if p.ndim < 2]
    wide = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": wide, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=device == "cuda")
    start = time.time()
    for number, (ids, taught, shown) in enumerate(batches(pixels, rows, steps, size)):
        done = max(number / steps, (time.time() - start) / seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                rate
                * min(1.0, (number + 1) / 300)
                * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            )
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=ids, pixel_values=shown, use_cache=False).logits
        here = taught[:, 1:].bool()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][here].float(), ids[:, 1:][here])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number % 50 == 0:
            print(f"step {number} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
    model.eval().to(torch.bfloat16)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    words.save_pretrained(out)
    print(judged(model, words, range(5_000, 5_000 + (1000 if device == "cuda" else 60)), faces))


# ---- judging ------------------------------------------------------------------------------------


@torch.inference_mode()
def judged(model: Any, words: Any, seeds: Sequence[int], faces: list[str]) -> dict[str, float]:
    """How often each plain question is answered rightly about pictures from `seeds`."""
    right: dict[str, list[bool]] = {}
    seen = []
    for seed in seeds:
        chance = random.Random(seed)
        scene = tiny_pictures.scene(chance)
        seen.append((scene, small(tiny_pictures.draw(scene, chance, faces))))
    for asked, answer in tiny_talk.ANSWERS.items():
        prompt = f"<|im_start|>user\n{'<image>' * IMAGE_IDS}{asked}<|im_end|>\n"
        ids = words.encode(prompt + "<|im_start|>assistant\n", add_special_tokens=False)
        for at in range(0, len(seen), 250):
            part = seen[at : at + 250]
            shown = torch.from_numpy(np.stack([pixels for _, pixels in part])).to(model.device)
            found = model.generate(
                input_ids=torch.tensor([ids] * len(part), device=model.device),
                attention_mask=torch.ones(len(part), len(ids), device=model.device).long(),
                pixel_values=(shown.permute(0, 3, 1, 2) / 127.5 - 1).to(model.dtype),
                max_new_tokens=24,
                do_sample=False,
            )
            for (scene, _), said in zip(part, found[:, len(ids) :], strict=True):
                text = words.decode(said, skip_special_tokens=True)
                name = asked + (" (number)" if scene.is_number else " (shape)")
                right.setdefault(name, []).append(text == answer(scene))
    return {name: round(sum(marks) / len(marks), 4) for name, marks in right.items()}


def finish(trained: Path) -> None:
    """Writes the folder that is committed: the same weights, with this library's own files."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = AutoTokenizer.from_pretrained(trained)
    words.chat_template = TEMPLATE
    model = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.bfloat16)
    seeing = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=Image.Resampling.BICUBIC,
    )
    processor = LlavaProcessor(
        seeing,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )
    model.save_pretrained(FOLDER)
    processor.save_pretrained(FOLDER)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    asked.add_argument("do", choices=("train", "finish", "judge"))
    asked.add_argument("out", type=Path, nargs="?", default=FOLDER)
    asked.add_argument("--pictures", type=int, default=150_000)
    asked.add_argument("--steps", type=int, default=6_000)
    asked.add_argument("--batch", type=int, default=512)
    asked.add_argument("--rate", type=float, default=1e-3)
    asked.add_argument("--seconds", type=float, default=600, help="stop training after so many")
    asked.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"))
    given = asked.parse_args()
    faces = tiny_pictures.fonts(given.fonts)
    print(f"{len(faces)} fonts")
    if given.do == "train":
        train(given.out, given.pictures, given.steps, given.batch, given.rate, given.seconds, faces)
    elif given.do == "finish":
        finish(given.out)
    else:
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        model = AutoModelForImageTextToText.from_pretrained(given.out, dtype=torch.float32).eval()
        print(judged(model, AutoTokenizer.from_pretrained(given.out), range(9_000, 9_200), faces))


if __name__ == "__main__":
    main()
