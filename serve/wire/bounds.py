"""How much one request may ask for: one table, each row with the 400 it gives.

Read by the dialects; docs/api.md's table is made from `LIMITS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve import pictures
from serve.errors import InvalidRequest

BODY_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `most` of `what` in the field that a caller names."""

    what: str
    most: int

    def check(self, count: int, where: str) -> None:
        if count > self.most:
            raise InvalidRequest(
                f"'{where}' has {count:,} {self.what}; at most {self.most:,} are allowed.",
                param=where,
            )


FIELDS = Limit("fields", 128)
DEPTH = Limit("levels of nesting (a body)", 100)
MESSAGES = Limit("messages or input items", 2048)
PARTS = Limit("content parts", 512)
IMAGES = Limit("images", pictures.MAX_IMAGES)
IMAGE_BYTES = Limit("bytes of a picture", pictures.MAX_BYTES)
TOOLS = Limit("tools", 512)
SCHEMA_CHARS = Limit("characters of JSON schema", 256 * 1024)
SCHEMA_DEPTH = Limit("levels of nesting (a schema)", 64)
CHOICES = Limit("choices (n)", 8)
STOPS = Limit("stop strings", 16)
STOP_CHARS = Limit("characters in a stop string", 256)
BIASES = Limit("entries in logit_bias", 1024)
TOP_LOGPROBS = Limit("top_logprobs", 20)
PROMPTS = Limit("prompts", 32)
SEQUENCES = Limit("choices of all prompts together", 64)
METADATA = Limit("keys of metadata", 16)

LIMITS: tuple[Limit, ...] = (
    FIELDS,
    DEPTH,
    MESSAGES,
    PARTS,
    IMAGES,
    IMAGE_BYTES,
    TOOLS,
    SCHEMA_CHARS,
    SCHEMA_DEPTH,
    CHOICES,
    STOPS,
    STOP_CHARS,
    BIASES,
    TOP_LOGPROBS,
    PROMPTS,
    SEQUENCES,
    METADATA,
)


def depth(value: Any, limit: int = 200) -> int:
    """Levels of nesting of a JSON value, counted without recursion; stops counting at `limit`."""
    level, layer = 0, [value]
    while layer and level < limit:
        level += 1
        layer = [
            child
            for item in layer
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return level
