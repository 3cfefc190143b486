"""Which format a loaded model speaks, told from its tokenizer and chat template, not its name.

Called once by app.py after loading.
"""

from __future__ import annotations

from typing import Any

from serve.formats.base import ChatFormat
from serve.formats.harmony import HarmonyFormat
from serve.formats.harmony_render import MARKERS, marks_of
from serve.formats.images import Sight
from serve.formats.template import TemplateFormat
from serve.formats.vocabulary import Vocabulary


def choose(
    tokenizer: Any,
    model_type: str = "",
    eos_ids: frozenset[int] = frozenset(),
    vocabulary_size: int = 0,
    processor: Any | None = None,
) -> ChatFormat:
    """`vocabulary_size` is how many ids the model's output layer has; it may be more than the
    tokenizer knows. `processor` is a vision model's, None for one that only reads."""
    sight = None
    if processor is not None:
        sight = Sight(processor)
        tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    vocabulary = Vocabulary(tokenizer, vocabulary_size)
    if marks_of(vocabulary) is not None:
        vocabulary = Vocabulary(tokenizer, vocabulary_size, control=MARKERS)
        marks = marks_of(vocabulary)
        assert marks is not None
        return HarmonyFormat(vocabulary, marks, eos_ids)
    return TemplateFormat(vocabulary, eos_ids, sight)
