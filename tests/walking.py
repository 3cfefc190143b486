"""A blind model for grammar tests: draws any allowed id, or follows a text and says where it may
not.

What a grammar lets through is what such a model writes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from serve.engine.face import Grammar, Matcher
from serve.formats.vocabulary import Vocabulary


def allowed(matcher: Matcher, size: int) -> list[int]:
    """Ids that may come next."""
    mask = np.full((2, -(-size // 32)), -1, np.int32)
    assert matcher.fill(mask, 1)
    assert (mask[0] == -1).all()  # no other row is touched
    bits = np.unpackbits(mask[1].view(np.uint8), bitorder="little")
    return [int(i) for i in np.nonzero(bits)[0] if i < size]


def wander(
    grammar: Grammar, words: Vocabulary, ends: Sequence[int], seed: int, limit: int = 400
) -> tuple[list[int], bool]:
    """Ids drawn blindly, and whether the grammar was fulfilled before `limit` ids."""
    draw = random.Random(seed)
    matcher = grammar.matcher()
    ids: list[int] = []
    for _ in range(limit):
        if matcher.is_finished():
            return ids, True
        choices = allowed(matcher, words.size)
        assert choices, words.decode(ids)
        # A blind model rarely closes a string; half the time take what closes one.
        closing = [i for i in choices if words.bytes_of(i) in (b'"', b"}", b"]", b'"}')]
        pool = closing if closing and draw.random() < 0.5 else choices
        token = draw.choice(pool)
        if token in ends:
            return ids, True
        matcher.accept(token)
        ids.append(token)
    return ids, False


def follow(grammar: Grammar, words: Vocabulary, ids: Sequence[int]) -> tuple[int, bool]:
    """How many of `ids` the grammar lets through, and whether it may end there."""
    matcher = grammar.matcher()
    for at, token in enumerate(ids):
        if token not in allowed(matcher, words.size):
            return at, False
        matcher.accept(token)
    return len(ids), matcher.is_finished()
