"""Conversations with pictures as a vision model's prompt: ids with room for each picture, tensors.

The model's own processor writes both, from the decoded pictures; control tokens in what users wrote
stay text. `Prompt.inputs` is a VisionInputs under the key "vision", which the engine reads. One
request's pictures are decoded and processed at a time, so that memory stays bounded. Knows no
engine and no HTTP; the processor is passed in. Used by template.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Any

import torch
from PIL import Image

from serve import pictures
from serve.engine.face import Prompt
from serve.values import Message

Turn = dict[str, Any]

_TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class VisionInputs:
    """What a vision tower needs of one prompt's pictures: `tensors` by the names its model gives
    them, on the CPU, and for each picture, in the prompt's order, a key of its pixels."""

    tensors: Mapping[str, torch.Tensor]
    keys: tuple[bytes, ...]


class Sight:
    """A processor, one request at a time."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._lock = Lock()

    def prompt(
        self,
        conversation: Sequence[Turn],
        messages: Sequence[Message],
        tools: Sequence[Turn],
        options: Mapping[str, Any],
        *,
        continues: bool,
    ) -> Prompt:
        """`conversation` is `messages` as the template takes them, with {"type": "image"} where a
        picture goes. Raises InvalidRequest, or what the template raises."""
        parts = [part for message in messages for part in message.images]
        pictures.check_together(parts)
        with self._lock:
            shown = [pictures.decode(part) for part in parts]
            made = self._process(_with_pictures(conversation, shown), tools, options, continues)
            is_counted = "batch_num_images" in made and len(parts) > 1
            keys = tuple(_key(picture, is_counted) for picture in shown)
        tensors = {
            name: value
            for name, value in made.items()
            if isinstance(value, torch.Tensor) and name not in _TEXT_KEYS
        }
        ids = tuple(int(i) for i in made["input_ids"][0])
        salts = tuple(zip(self._places(ids, made, len(keys)), keys, strict=True))
        return Prompt(ids, {"vision": VisionInputs(tensors, keys)}, salts=salts)

    def _places(self, ids: tuple[int, ...], made: Mapping[str, Any], count: int) -> list[int]:
        """Where each picture's first token is; the first one's for all, when that cannot be told
        from what the processor wrote in each one's place."""
        words = self._processor.tokenizer
        mark = getattr(words, "image_token", None) or self._processor.image_token
        token = words.convert_tokens_to_ids(mark)
        places = [place for place, one in enumerate(ids) if one == token]
        written = made.get("text_replacement_offsets") or [[]]
        lengths = [part["replacement"].count(mark) for part in written[0]]
        if len(lengths) != count or sum(lengths) != len(places) or 0 in lengths:
            return places[:1] * count or [0] * count
        return [places[start] for start in accumulate(lengths[:-1], initial=0)]

    def _process(
        self,
        conversation: list[Turn],
        tools: Sequence[Turn],
        options: Mapping[str, Any],
        continues: bool,
    ) -> Mapping[str, Any]:
        made: Mapping[str, Any] = self._processor.apply_chat_template(
            conversation,
            tools=list(tools) or None,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
            processor_kwargs={
                "return_mm_token_type_ids": False,
                "return_text_replacement_offsets": True,
            },
            **options,
        )
        return made


def _with_pictures(conversation: Sequence[Turn], shown: Sequence[Image.Image]) -> list[Turn]:
    """The turns again (the processor changes what it is given), each picture in its place."""
    left = iter(shown)
    placed: list[Turn] = []
    for turn in conversation:
        content = turn["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image", "image": next(left)} if part["type"] == "image" else dict(part)
                for part in content
            ]
        placed.append({**turn, "content": content})
    return placed


def _key(picture: Image.Image, is_one_of_several: bool) -> bytes:
    """Of the pixels, and of what else decides how they are cut up: some models cut a lone picture
    finer than one of several."""
    about = f"{picture.size} {is_one_of_several} ".encode()
    return hashlib.blake2b(about + picture.tobytes(), digest_size=16).digest()
