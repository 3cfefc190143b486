"""A JSON object being read: typed getters whose errors name the field, the value and the fix.

`parse` turns bytes into a Body; the dialects (chat, responses, completions) read from it. JSON's
null counts as absent everywhere. Numbers are finite and in range, true is not 1. Knows no fields
by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from serve.errors import InvalidRequest
from serve.wire import bounds


class Body:
    """`path` is where this object sits in the request ("" is the top). `ignored` collects, for
    the whole request, the paths that were understood to be harmless and left alone."""

    def __init__(
        self, data: Mapping[str, Any], path: str = "", ignored: list[str] | None = None
    ) -> None:
        self.data = data
        self.path = path
        self.ignored: list[str] = [] if ignored is None else ignored

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str) -> Any:
        return self.data.get(name)

    def has(self, name: str) -> bool:
        return self.data.get(name) is not None

    def ignore(self, name: str) -> None:
        self.ignored.append(self.at(name))

    def wrong(self, name: str, wanted: str) -> InvalidRequest:
        return InvalidRequest(
            f"'{self.at(name)}' must be {wanted}, not {shown(self.get(name))}.", param=self.at(name)
        )

    def text(self, name: str, longest: int | None = None) -> str | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        if longest is not None and len(value) > longest:
            raise InvalidRequest(
                f"'{self.at(name)}' has {len(value)} characters; at most {longest} are allowed.",
                param=self.at(name),
            )
        return value

    def required_text(self, name: str) -> str:
        value = self.text(name)
        if not value:
            raise self.wrong(name, "a non-empty string")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        if not low <= value <= high or not math.isfinite(value):
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str | None:
        value = self.get(name)
        if value is not None and (not isinstance(value, str) or value not in allowed):
            raise self.wrong(name, "one of " + ", ".join(allowed))
        return value

    def object(self, name: str) -> Body | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Body(value, self.at(name), self.ignored)

    def required_object(self, name: str) -> Body:
        value = self.object(name)
        if value is None:
            raise self.wrong(name, "an object")
        return value

    def list(self, name: str) -> list[Any] | None:
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "an array")
        return value

    def objects(self, name: str) -> Iterator[Body]:
        """Every element of an array of objects, each knowing its place."""
        for i, value in enumerate(self.list(name) or ()):
            where = f"{self.at(name)}[{i}]"
            if not isinstance(value, Mapping):
                raise InvalidRequest(
                    f"'{where}' must be an object, not {shown(value)}.", param=where
                )
            yield Body(value, where, self.ignored)


def shown(value: Any) -> str:
    """A value as an error may show it: its JSON, shortened; containers by their kind only."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "an array"
    written = json.dumps(value)
    return written if len(written) <= 60 else written[:57] + "…"


def parse(raw: bytes) -> Body:
    """The request's JSON object. Raises InvalidRequest for anything else."""
    try:
        data = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as wrong:
        where = f" (line {wrong.lineno})" if isinstance(wrong, json.JSONDecodeError) else ""
        raise InvalidRequest(f"The request body is not valid JSON{where}.") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"The request body must be a JSON object, not {shown(data)}.")
    bounds.DEPTH.check(bounds.depth(data), "body")
    if b"\\ud" in raw or b"\\uD" in raw:
        data = _without_lone_surrogates(data)
    return Body(data)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_lone_surrogates(value: Any) -> Any:
    """Half a character cannot be tokenized or sent back; U+FFFD stands for it."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_lone_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_lone_surrogates(k): _without_lone_surrogates(v) for k, v in value.items()}
    return value
