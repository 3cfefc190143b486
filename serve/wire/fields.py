"""Every request field of the three dialects, in one table: honoured, harmless, or refused.

The tables are in fields_chat.py, fields_responses.py and fields_completions.py; here is what a
row means, the check that every request passes, and the OpenAPI schema. docs/api.md's tables
are made from them by tables.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.errors import InvalidRequest, Unsupported
from serve.values import JSONObject
from serve.wire import bounds
from serve.wire.body import Body

Standing = Literal["honoured", "harmless", "refused"]


@dataclass(frozen=True, slots=True)
class Field:
    """`says` is docs/api.md's text; for a refused field, also what its error advises.

    A refused field may be null or one of `neutral`, which ask for nothing. `is_extra`: not
    OpenAI's own.
    """

    name: str
    standing: Standing
    says: str
    schema: JSONObject = field(default_factory=dict)
    neutral: tuple[Any, ...] = ()
    is_required: bool = False
    is_extra: bool = False


def check(body: Body, table: Sequence[Field]) -> None:
    """Raises Unsupported for a refused field and InvalidRequest for a misspelt one; fields that
    nobody knows are left alone and reported as ignored."""
    known = {row.name: row for row in table}
    bounds.FIELDS.check(len(body.data), "body")
    for name, value in body.data.items():
        row = known.get(name)
        if row is None:
            _check_unknown(body, name, list(known))
        elif row.standing == "refused" and not _is_neutral(value, row):
            raise Unsupported(f"'{name}' is not supported: {row.says}.", param=name)


def _is_neutral(value: Any, row: Field) -> bool:
    return value is None or any(
        value == neutral and type(value) is type(neutral) for neutral in row.neutral
    )


def _check_unknown(body: Body, name: str, known: list[str]) -> None:
    if name in FOREIGN:
        raise Unsupported(
            f"'{name}' is another server's option and would change the answer: {FOREIGN[name]}.",
            param=name,
        )
    near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.87)
    if near:
        raise InvalidRequest(f"There is no field '{name}'; did you mean '{near[0]}'?", param=name)
    body.ignore(name)


_GRAMMAR = "use response_format with a JSON schema"
_SAMPLER = "use temperature, top_p, top_k, min_p or the penalties"

# Fields of other servers that change what is answered: refused by name, never dropped.
FOREIGN: dict[str, str] = {
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar",
         "grammar_string", "json_schema", "structured_outputs", "regex", "ebnf"), _GRAMMAR),
    **dict.fromkeys(
        ("typical_p", "tfs_z", "tfs", "top_a", "mirostat", "mirostat_tau", "mirostat_eta",
         "dry_multiplier", "xtc_probability", "epsilon_cutoff", "eta_cutoff", "smoothing_factor",
         "dynatemp_range", "no_repeat_ngram_size", "generation_config"), _SAMPLER),
    "use_beam_search": "answers are sampled",
    "length_penalty": "answers are sampled",
    "num_beams": "answers are sampled",
    "prompt_logprobs": "log probabilities are of answers only",
    "bad_words": "use logit_bias",
    "allowed_token_ids": "use logit_bias",
    "chat_template": "the model's own template is used",
    "documents": "put documents into a message",
    "negative_prompt": "there is no guidance here",
    "guidance_scale": "there is no guidance here",
    "thinking": "use reasoning_effort",
    "lora_request": "one set of weights serves",
    "echo": "only /v1/completions echoes its prompt",
}  # fmt: skip


# ---- schema fragments ---------------------------------------------------------------------------

TEXT: JSONObject = {"type": ["string", "null"]}
FLAG: JSONObject = {"type": ["boolean", "null"]}
OBJECT: JSONObject = {"type": ["object", "null"]}
ARRAY: JSONObject = {"type": ["array", "null"]}
ANY: JSONObject = {}


def number(low: float, high: float) -> JSONObject:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def whole(low: int, high: int) -> JSONObject:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def one_of(*values: str) -> JSONObject:
    return {"enum": [*values, None]}


def schema(table: Sequence[Field]) -> dict[str, Any]:
    """The request body's JSON schema for the OpenAPI description."""
    return {
        "type": "object",
        "properties": {
            row.name: dict(row.schema) | {"description": row.says}
            for row in table
            if row.standing != "refused"
        },
        "required": [row.name for row in table if row.is_required],
    }
