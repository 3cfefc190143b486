"""A local folder as a model: checked, with everything of its config that could run code taken out.

Only safetensors are read, nothing of the folder is executed, and what a chat needs (template, end
ids, context length) is either found or said to be missing. Knows no hubs. Called by loader.py.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from serve.quantization.arrival import Arrived, told
from serve.quantization.plan import Plan, Refused, Weights

log = logging.getLogger(__name__)

POINTER = b"version https://git-lfs"
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|return|>",
    "<|eom_id|>",
)
CONTEXT_FIELDS = (
    "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len",
)  # fmt: skip
HEADER_LIMIT = 100 * 2**20


def read_config(folder: Path) -> dict[str, Any]:
    """config.json without what could name code: `auto_map`, attention and kernel choices at any
    depth (CVE-2026-4372: a config may name a kernel to fetch and run). Raises Refused."""
    return clean_config(_read_json(folder / "config.json"))


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config.get("model_type"), str):
        raise Refused("its config.json names no model_type", "Use a model in transformers' format.")
    return {key: _clean(value) for key, value in config.items() if not _may_run_code(key)}


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _clean(inner) for key, inner in value.items() if not _may_run_code(key)}
    return [_clean(inner) for inner in value] if isinstance(value, list) else value


def _may_run_code(key: object) -> bool:
    name = str(key).lower()
    if name.startswith(("_attn", "attn_implementation", "_experts_impl", "experts_impl")):
        return True
    return name in ("auto_map", "custom_pipelines", "trust_remote_code") or (
        "kernel" in name and not name.endswith(("kernel_size", "kernel_dim"))
    )


def read_weights(folder: Path) -> Weights:
    """The config and the size of the folder's whole, unbroken weights. Raises Refused."""
    config = read_config(folder)
    files = weight_files(folder)
    for file in files:
        check_safetensors(file)
    return Weights(config, sum(file.stat().st_size for file in files))


def is_whole(folder: Path) -> bool:
    """False for a folder that another program's broken download left (a hub's cache may)."""
    try:
        read_weights(folder)
    except Refused:
        return False
    return True


def weight_files(folder: Path) -> list[Path]:
    """Every safetensors file that the model consists of. Raises Refused when one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in named if not (folder / str(name)).is_file()]
        if missing:
            raise Refused(
                f"{len(missing)} of its {len(named)} weight files are missing ({missing[0]} first)",
                "Fetch the missing files, or delete the folder to have it fetched again.",
            )
        return [folder / str(name) for name in named]
    found = sorted(folder.glob("*.safetensors"))
    whole = [file for file in found if file.name == "model.safetensors"] or found
    if whole:
        return whole
    others = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    if others:
        raise Refused(
            f"its weights are {others[0].name}, a format that can run code when it is read",
            "Convert it to safetensors, or name a model that has them.",
        )
    raise Refused("the folder has no .safetensors and no .gguf file", "Name a folder with weights.")


def check_safetensors(path: Path) -> dict[str, int]:
    """The bytes of each tensor in the file. Raises Refused unless it is as long as its header says,
    and no Git LFS pointer."""
    size = path.stat().st_size
    with path.open("rb") as stored:
        start = stored.read(len(POINTER))
        if start == POINTER:
            raise Refused(
                f"{path.name} is a Git LFS pointer, not the weights", "Run `git lfs pull` in it."
            )
        (length,) = struct.unpack("<Q", start[:8].ljust(8, b"\0"))
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise Refused(f"{path.name} is broken or cut off", "Delete it and fetch it again.")
        stored.seek(8)
        header = stored.read(length)
    try:
        entries = json.loads(header)
        places = {k: e["data_offsets"] for k, e in entries.items() if k != "__metadata__"}
        sizes = {name: end - begin for name, (begin, end) in places.items()}
        promised = 8 + length + max((end for _, end in places.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"{path.name} has a broken header", "Fetch it again.") from None
    if promised != size:
        raise Refused(
            f"{path.name} has {size} bytes where its header promises {promised}",
            "Delete it and fetch it again.",
        )
    return sizes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(
            f"the folder has no {path.name}", "Use a model in transformers' format."
        ) from None
    except (OSError, ValueError) as error:
        raise Refused(f"{path.name} cannot be read ({error})", "Fetch it again.") from None
    if not isinstance(found, dict):
        raise Refused(f"{path.name} is not a JSON object", "Fetch it again.")
    return found


def sees_images(config: Mapping[str, Any]) -> bool | None:
    """True: made for images and text; False: for text only; None: says both, cannot be known."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING,
    )

    kind = config["model_type"]
    has_vision = isinstance(config.get("vision_config"), Mapping)
    if kind in SEEING:
        return True if has_vision else (None if kind not in TEXT else False)
    if kind in TEXT:
        return None if has_vision else False
    raise Refused(
        f"models of type {kind!r} are not known to the installed transformers",
        "Upgrade transformers, or name another model.",
    )


def load_weights(
    folder: Path,
    config: Mapping[str, Any],
    plan: Plan,
    device: str,
    *,
    vision: bool,
    arrived: Arrived = lambda count: None,
) -> Any:
    """The model in eval mode on `device`, where its tensors go one by one; `arrived` is told the
    stored bytes of each. Raises Refused."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from serve.quantization.transform import quantization_options, stated_config, without_compiler

    files = weight_files(folder)
    sizes = {name: size for file in files for name, size in check_safetensors(file).items()}
    options = quantization_options(plan, config, files)
    stated = stated_config(plan, config, device)
    made = CONFIG_MAPPING[config["model_type"]].from_dict(stated)
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    try:
        with told(sizes, arrived):
            model = kind.from_pretrained(
                str(folder),
                config=made,
                dtype=getattr(torch, plan.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                device_map={"": device},
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError) as error:
        raise Refused(
            f"transformers cannot load it: {_first_line(error)}",
            "Check the folder against the model's page, or name another model.",
        ) from error
    if plan.method == "gptqmodel":
        without_compiler(model)
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise Refused(
            f"its tokenizer cannot be loaded: {_first_line(error)}",
            "The folder needs tokenizer.json (or the tokenizer's own files).",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def need_template(tokenizer: Any, name: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise Refused(
            f"{name} has no chat template, so a conversation cannot be written for it",
            "Put its template into the folder as chat_template.jinja, or name an instruct model.",
        )


def stated_ends(folder: Path, config: Mapping[str, Any]) -> set[int]:
    """End ids that the folder's own files name. A config class's defaults are another model's."""
    path = folder / "generation_config.json"
    generation = _read_json(path) if path.exists() else {}
    text = config.get("text_config")
    holders = (generation, config, text if isinstance(text, Mapping) else {})
    return {end for holder in holders for end in _ids(holder.get("eos_token_id"))}


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int) and one >= 0]


def end_ids(stated: Collection[int], tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the stated ones, the tokenizer's, and the turn's end that its chat
    template writes. Raises Refused when there is none."""
    found = {*stated, *_ids(tokenizer.eos_token_id)}
    template = str(getattr(tokenizer, "chat_template", ""))
    vocabulary = tokenizer.get_vocab()
    found.update(vocabulary[end] for end in TURN_ENDS if end in template and end in vocabulary)
    if not found:
        raise Refused(
            "no token that ends an answer is named in its configs",
            'Put {"eos_token_id": …} into generation_config.json.',
        )
    return frozenset(found)


def context_length(config: Any, tokenizer: Any) -> tuple[int, str]:
    """The longest sequence in tokens, and a note when it had to be guessed."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in CONTEXT_FIELDS:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value, ""
    told = getattr(tokenizer, "model_max_length", 0)
    if 0 < told < 10_000_000:
        return int(told), ""
    return 2048, "the config names no context length; 2048 tokens are assumed (MAX_CONTEXT)"
