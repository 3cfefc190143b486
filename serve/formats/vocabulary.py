"""A tokenizer as formats see it: which exact bytes every id stands for, and text to ids.

The byte table is read once from a fast tokenizer's own decoder (byte-level BPE, or SentencePiece
pieces with byte fallback), checked against it on a sample, and makes reading an id a list lookup.
A tokenizer with any other decoder gets no table and is read through its own `decode`. Knows no
roles, tags or templates. Used by text.py and every format.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from threading import Lock
from types import SimpleNamespace
from typing import Any

log = logging.getLogger(__name__)

_SAMPLE = "Hello, world!  naïve 日本語 👩‍👩‍👧 — def f(x):\n\treturn [x, 'ß']  # 1,234.5\n"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """`size` is the number of ids the model may draw (its output layer), at least the tokenizer's.

    `control_ids` are special tokens, and those that `control` names: never part of a text.
    `table[id]` is that id's bytes, None for a tokenizer that cannot be read id by id.
    """

    def __init__(self, tokenizer: Any, size: int = 0, control: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.size = max(size, len(tokenizer))
        self._ids: dict[str, int] = tokenizer.get_vocab()
        named = {self._ids[token] for token in control if token in self._ids}
        self.control_ids = _control_ids(tokenizer) | named
        self.table, self.strips_first_space = _byte_table(tokenizer, self.size)
        # A fast tokenizer keeps its settings (such as "split special tokens") in one shared
        # object, so two threads may not encode through it at once.
        self.lock = Lock()
        self._plain: Any = None

    def id_of(self, token: str) -> int | None:
        """The id whose token text is exactly `token`, None if there is none."""
        return self._ids.get(token)

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        """Ids of `text`, control tokens written in it included; `begin` adds the model's own begin
        token."""
        with self.lock:
            return list(self.tokenizer.encode(text, add_special_tokens=begin))

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` as mere text: control tokens written in it become their characters."""
        return self.encode_plain_many([text])[0]

    def encode_plain_many(self, texts: list[str]) -> list[list[int]]:
        """`encode_plain` of each text, in one call of the tokenizer. Waits for no other thread."""
        if self._plain is None:
            with self.lock:
                self._plain = self._plain or _plain_copy(self.tokenizer, self.control_ids)
        found = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return [list(encoding.ids) for encoding in found]

    def bytes_of(self, token: int) -> bytes:
        """The exact bytes `token` adds to a text; a control token gives its name's. Unknown ids
        give b""."""
        if not 0 <= token < self.size:
            return b""
        if self.table is not None:
            return self.table[token]
        return str(self.tokenizer.decode([token])).encode()

    def decode(self, ids: Iterable[int]) -> str:
        """What `ids` say together, control tokens left out."""
        kept = [token for token in ids if token not in self.control_ids]
        if self.table is None:
            return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))
        text = b"".join(map(self.bytes_of, kept)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_first_space else text


def _plain_copy(tokenizer: Any, control_ids: frozenset[int]) -> Any:
    """A second tokenizer that reads everything as text and is never set otherwise, so that any
    number of threads may use it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _SlowPlain(tokenizer)
    plain = type(backend).from_str(_all_special(backend.to_str(), tokenizer, control_ids))
    plain.encode_special_tokens = True
    plain.no_padding()
    plain.no_truncation()
    return plain


def _all_special(written: str, tokenizer: Any, control_ids: frozenset[int]) -> str:
    """The tokenizer's JSON with every control token marked special, which some files forget."""
    added = tokenizer.added_tokens_decoder
    if all(added[token].special for token in control_ids if token in added):
        return written
    state = json.loads(written)
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["id"] in control_ids
    return json.dumps(state)


class _SlowPlain:
    """The same for a tokenizer written in Python."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        return [
            SimpleNamespace(
                ids=self._tokenizer.encode(
                    text, add_special_tokens=add_special_tokens, split_special_tokens=True
                )
            )
            for text in texts
        ]


def _control_ids(tokenizer: Any) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder
    return frozenset(
        {int(i) for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    )


def _byte_table(tokenizer: Any, size: int) -> tuple[list[bytes] | None, bool]:
    """The bytes of every id, and whether a whole text's first space is dropped."""
    steps = _decoder_steps(tokenizer)
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        read, strips = _read_byte_level, False
    elif kinds and kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        if any(s["type"] == "Replace" and s["pattern"] != {"String": "▁"} for s in steps):
            return None, False
        read = _read_piece
        strips = any(
            step["type"] == "Strip" or step.get("prepend_scheme", "never") != "never"
            for step in steps
        )
    else:
        log.info("No byte table for this tokenizer (decoder: %s); reading it by windows.", kinds)
        return None, False
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    table = [b"" if piece is None else read(piece) for piece in pieces]
    table += [b""] * (size - len(table))
    sample = tokenizer.encode(_SAMPLE, add_special_tokens=False)
    told = b"".join(table[i] for i in sample).decode("utf-8", "replace")
    if strips:
        told = told.removeprefix(" ")
    if told != tokenizer.decode(sample, clean_up_tokenization_spaces=False):
        log.info("This tokenizer's decoder does more than join bytes; reading it by windows.")
        return None, False
    return table, strips


def _decoder_steps(tokenizer: Any) -> list[dict[str, Any]]:
    """The decoder's steps as the tokenizers library writes them; [] without a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(backend, "decoder", None) is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each of the 256 bytes, read backwards.

    Printable bytes stand for themselves; the others are counted up from U+0100 in byte order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    alphabet = {chr(b): b for b in shown}
    alphabet.update({chr(0x100 + i): b for i, b in enumerate(hidden)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


def _read_byte_level(piece: str) -> bytes:
    try:
        return bytes([_ALPHABET[c] for c in piece])
    except KeyError:  # an added token, kept as plain text
        return piece.encode("utf-8", "replace")


def _read_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    return piece.replace("▁", " ").encode("utf-8", "replace")
