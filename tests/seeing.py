"""A tiny model that sees, what transformers alone says with it, and requests to compare.

Used by the engine's tests and by bench/gpu/vision.py, which has no pytest.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

from PIL import Image

from serve.engine.engine import PagedEngine
from serve.engine.face import BlockingMailbox, Ended, GenerationRequest, Tokens
from serve.formats.base import ChatFormat
from serve.formats.choose import choose
from serve.quantization.processor import load_processor
from serve.values import ChatRequest, ImagePart, Message, Sampling, TextPart
from tests.tiny_pictures import Scene, draw

ANSWER = 12
# Pictures of several sizes and shapes, and the questions about them.
PICTURES = (("red", "star", (150, 90)), ("blue", "heart", (60, 100)), ("green", "7", (112, 112)))
ASKED = ("What is this?", "Name the colour, please.", "Compare.")


class Seeing:
    """A tiny model of one family, its format, and what transformers says with it."""

    def __init__(self, folder: Path, make: Any) -> None:
        from transformers import AutoModelForImageTextToText

        make(folder)
        self.folder = folder
        self.processor = load_processor(folder)
        assert self.processor is not None
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.format = format_of(self.processor, self.model)

    def fresh_model(self) -> Any:
        """Apart from the reference: the engine changes its layers."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(self.folder).eval()

    def expected(self, request: ChatRequest) -> list[int]:
        """By transformers alone: its processor, its generate."""
        conversation = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    if isinstance(part, TextPart)
                    else {"type": "image", "image": Image.open(io.BytesIO(part.data))}
                    for part in message.parts
                ],
            }
            for message in request.messages
        ]
        inputs = self.processor.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        found = self.model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        return [int(i) for i in found[0, inputs["input_ids"].shape[1] :]]


def format_of(processor: Any, model: Any) -> ChatFormat:
    ends = frozenset({int(model.generation_config.eos_token_id)})
    return choose(processor.tokenizer, "", ends, processor=processor)


def part(number: int) -> ImagePart:
    colour, thing, size = PICTURES[number]
    picture = draw(Scene(colour, thing), random.Random(number)).resize(size)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return ImagePart(out.getvalue(), where=f"messages[0].content[{number}].image_url.url")


def request(*pictures: int, text: str = ASKED[0]) -> ChatRequest:
    parts = (*(part(number) for number in pictures), TextPart(text))
    return ChatRequest((Message("user", parts),), Sampling(temperature=0.0, max_tokens=ANSWER))


def submitted(engine: PagedEngine, form: ChatFormat, asked: ChatRequest, tenant: str = "") -> Any:
    rendered = form.render(asked)
    mailbox = BlockingMailbox()
    engine.submit(
        GenerationRequest(rendered.prompt, asked.sampling, tenant, rendered.stop_ids), mailbox
    )
    return mailbox


def answered(mailbox: BlockingMailbox) -> tuple[list[int], Ended]:
    ids: list[int] = []
    for message in mailbox:
        if isinstance(message, Tokens):
            ids += message.ids
        elif isinstance(message, Ended):
            assert message.outcome == "finished", message.error
            return ids, message
    raise AssertionError("the mailbox ended without an end")


def conversations() -> list[ChatRequest]:
    chat = (
        Message("user", (part(0), TextPart("What?"))),
        Message("assistant", (TextPart("A star."),)),
        Message("user", (TextPart("And this? "), part(2))),
    )
    return [
        request(0),
        request(1, text=ASKED[1]),
        request(0, 1, 2, text=ASKED[2]),
        request(text="The capital of France is"),
        ChatRequest(chat, Sampling(temperature=0.0, max_tokens=ANSWER)),
    ]
