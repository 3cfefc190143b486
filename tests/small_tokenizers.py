"""Real tokenizers small enough to make in a test: byte-level BPE, SentencePiece style, WordPiece.

Each is a transformers fast tokenizer with a chat template, trained here on a few sentences.
"""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and says: hello world!",
    "def add(x, y):\n    return x + y\n",
    "日本語のテキストと絵文字 👩‍👩‍👧 🎉 naïve café Straße",
    "Один два три четыре пять. {'name': 'value', \"id\": 12345}",
] * 4
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]


@cache
def byte_level(template: str = CHATML, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """GPT-2 style; `added` are more tokens that a text may hold (such as <think>)."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.add_tokens(list(added))
    return _wrapped(raw, template)


@cache
def sentencepiece(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Llama 2 style: pieces with a visible space, byte fallback, first space stripped."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        SENTENCES[:2], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    pieces = ["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *learned]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    raw.add_special_tokens(SPECIAL)
    return _wrapped(raw, template)


@cache
def wordpiece(template: str = CHATML) -> PreTrainedTokenizerFast:
    """BERT style: a decoder that is no joining of bytes."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    raw.train_from_iterator(
        SENTENCES,
        trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=["<unk>", *SPECIAL], show_progress=False
        ),
    )
    return _wrapped(raw, template)


def _wrapped(raw: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        bos_token="<s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template or None
    return tokenizer
