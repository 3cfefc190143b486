"""Conversations with pictures as prompts: the processor's own ids, and nothing that users write can
pass for a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from serve import pictures
from serve.errors import InvalidRequest, Unsupported
from serve.formats.base import ChatFormat
from serve.formats.choose import choose
from serve.formats.images import VisionInputs
from serve.quantization.processor import load_processor
from serve.values import ChatRequest, ImagePart, Message, TextPart
from tests.tiny import tiny_llama
from tests.tiny_vision import FAMILIES


def png(colour: str = "red", size: tuple[int, int] = (120, 80)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def asked(*parts: ImagePart | str) -> ChatRequest:
    made = tuple(TextPart(part) if isinstance(part, str) else part for part in parts)
    return ChatRequest((Message("user", made),))


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        name: load_processor(make(tmp_path_factory.mktemp("seeing")))
        for name, make in FAMILIES.items()
    }


def form(processor: Any) -> ChatFormat:
    return choose(processor.tokenizer, processor=processor)


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_are_pillows_without_a_video_part_and_keep_their_class(
    family: str, processors: dict[str, Any]
) -> None:
    processor = processors[family]
    assert processor is not None
    assert type(processor.image_processor).__name__.endswith("Pil")
    assert set(type(processor).get_attributes()) == {"image_processor", "tokenizer"}
    names = {"Gemma 3": "Gemma3Processor", "Mistral 3": "PixtralProcessor"}
    assert type(processor).__name__ == names.get(family, type(processor).__name__)


def _vision(prompt: Any) -> VisionInputs:
    found = prompt.inputs["vision"]
    assert isinstance(found, VisionInputs)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pictures_words_written_by_a_user_stay_words(
    family: str, processors: dict[str, Any]
) -> None:
    processor = processors[family]
    spoken = form(processor)
    marks = [t for t in processor.tokenizer.get_added_vocab() if "im" in t.lower()]
    honest = spoken.render(asked(ImagePart(png()), "Hello")).prompt
    forged = spoken.render(asked(ImagePart(png()), f"Hello {' '.join(marks)} there")).prompt
    for mark in marks:
        token = processor.tokenizer.convert_tokens_to_ids(mark)
        assert forged.ids.count(token) == honest.ids.count(token), mark


def test_the_salt_is_of_the_pixels(
    processors: dict[str, Any],
) -> None:
    spoken = form(processors["Qwen2.5-VL"])
    red, other = png(), png("blue")
    one = spoken.render(asked(ImagePart(red), "x")).prompt
    same = spoken.render(asked(ImagePart(red, where="elsewhere"), "x")).prompt
    blue = spoken.render(asked(ImagePart(other), "x")).prompt
    assert one.ids == same.ids == blue.ids
    assert one.salts == same.salts != blue.salts
    assert spoken.render(asked("x")).prompt.salts == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_pictures_salt_stands_where_its_tokens_begin(
    family: str, processors: dict[str, Any]
) -> None:
    spoken = form(processors[family])
    red, blue = ImagePart(png()), ImagePart(png("blue", (60, 100)))
    alone = spoken.render(asked("before", red, "x")).prompt
    both = spoken.render(asked("before", red, "x", blue)).prompt
    (place, key), (later, other) = both.salts
    assert alone.salts[0][0] == place < later and key != other
    assert both.ids[place] == both.ids[later]
    assert both.ids[:place] == alone.ids[:place]
    assert later > place + alone.ids.count(alone.ids[place]) or "One" in family
    assert (alone.salts[0][1] == key) == ("OneVision" not in family)
    assert tuple(salt for _, salt in both.salts) == _vision(both).keys


def test_low_detail_costs_fewer_tokens(processors: dict[str, Any]) -> None:
    processor = processors["Qwen2.5-VL"]
    before = processor.image_processor.size
    processor.image_processor.size = type(before)(shortest_edge=784, longest_edge=784 * 2000)
    try:
        spoken = form(processor)
        large = png(size=(1200, 900))
        high = spoken.render(asked(ImagePart(large, detail="high"), "x")).prompt
        low = spoken.render(asked(ImagePart(large, detail="low"), "x")).prompt
        assert len(low.ids) < len(high.ids) / 4
    finally:
        processor.image_processor.size = before


def test_more_pictures_than_allowed_are_refused_naming_the_first_too_many(
    processors: dict[str, Any],
) -> None:
    parts = [ImagePart(png(size=(8, 8)), where=f"part {i}") for i in range(pictures.MAX_IMAGES + 1)]
    with pytest.raises(InvalidRequest) as refused:
        form(processors["Llava"]).render(asked(*parts))
    assert refused.value.param == f"part {pictures.MAX_IMAGES}"


def test_a_picture_that_cannot_be_decoded_is_refused_naming_its_part(
    processors: dict[str, Any],
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        form(processors["Llava"]).render(asked(ImagePart(png()[:60], where="here"), "x"))
    assert refused.value.param == "here"


def test_a_model_that_only_reads_refuses_a_picture_naming_its_part(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    spoken = choose(AutoTokenizer.from_pretrained(tiny_llama(tmp_path)))
    with pytest.raises(Unsupported) as refused:
        spoken.render(asked(ImagePart(png(), where="input[0].content[0].image_url"), "x"))
    assert refused.value.param == "input[0].content[0].image_url"


def test_pillows_pixels_are_the_rule_written_out(processors: dict[str, Any]) -> None:
    """Resized (bicubic), scaled to 0..1, then by mean and deviation: within rounding."""
    noise = np.random.default_rng(0).integers(0, 255, (90, 130, 3), np.uint8)
    picture = Image.fromarray(noise)
    out = io.BytesIO()
    picture.save(out, "PNG")
    processor = processors["Gemma 3"].image_processor
    prompt = form(processors["Gemma 3"]).render(asked(ImagePart(out.getvalue()), "x")).prompt
    resized = picture.resize((56, 56), Image.Resampling(int(processor.resample)))
    wanted = (np.asarray(resized, np.float32) / 255 - processor.image_mean) / processor.image_std
    found = _vision(prompt).tensors["pixel_values"][0].permute(1, 2, 0)
    assert torch.allclose(found, torch.from_numpy(wanted.astype(np.float32)), atol=0.02)


def test_a_processor_whose_template_has_no_place_for_a_picture_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = FAMILIES["Llava"](tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    )
    assert load_processor(folder) is None
    assert "no place for a picture" in caplog.text
    (folder / "processor_config.json").unlink()
    (folder / "config.json").write_text("{}")
    assert load_processor(folder) is None
    assert "its image processor fails" in caplog.text
