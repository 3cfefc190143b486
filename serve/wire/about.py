"""What serves here, in public: the model list, readiness, and a fingerprint of what answers.

Pure. `/v1/models` carries OpenAI's list and, beside it, the `models` array that Codex reads.
Used by openai_compat.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from serve.values import ModelCard, Status

VERSION = "0.1.0"

# Codex sends these instead of its own where it takes the model from this list.
_CODEX_INSTRUCTIONS = (
    "You are a coding agent in the user's terminal. Work in the user's folder with the tools you "
    "are given: look before you change, change no more than was asked, run what shows that it "
    "works, and end with a short account of what you did and what you could not do."
)


def fingerprint(card: ModelCard) -> str:
    """Changes when answers to the same seed may change: other weights, way of holding them,
    device or code."""
    told = "\0".join((card.id, card.quantization, card.device.split(":")[0], VERSION))
    return "fp_" + hashlib.sha256(told.encode()).hexdigest()[:12]


def model_json(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": card.id.partition("/")[0] if "/" in card.id else "local",
        "context_length": card.context_length,
        "max_model_len": card.context_length,
        "aliases": list(dict.fromkeys(("default", *card.aliases))),
        "capabilities": asdict(card.capabilities),
        "quantization": card.quantization,
        "is_loaded": True,
    }


def offered_json(model_id: str) -> dict[str, Any]:
    """A model that fits this machine and is not loaded now; asking for it may switch to it."""
    return {
        "id": model_id,
        "object": "model",
        "created": 0,
        "owned_by": model_id.partition("/")[0] if "/" in model_id else "local",
        "is_loaded": False,
    }


def models_json(cards: Sequence[ModelCard], offered: Sequence[str] = ()) -> dict[str, Any]:
    served = [model_json(card) for card in cards]
    names = {card.id for card in cards}
    others = [offered_json(name) for name in offered if name not in names]
    return {
        "object": "list",
        "data": [*served, *others],
        "models": [_codex_json(card) for card in cards],
    }


def _codex_json(card: ModelCard) -> dict[str, Any]:
    efforts = card.capabilities.efforts
    return {
        "slug": card.id,
        "display_name": card.id,
        "description": None,
        "default_reasoning_level": "medium" if "medium" in efforts else None,
        "supported_reasoning_levels": [
            {"effort": effort, "description": f"{effort} effort"} for effort in efforts
        ],
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 0,
        "base_instructions": _CODEX_INSTRUCTIONS,
        "supports_reasoning_summaries": False,
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": None,
        "truncation_policy": {"mode": "bytes", "limit": 10_000},
        "supports_parallel_tool_calls": True,
        "context_window": card.context_length,
        "input_modalities": ["text", "image"] if card.capabilities.vision else ["text"],
        "experimental_supported_tools": [],
    }


def ready_json(status: Status) -> dict[str, Any]:
    """State of the model, in words and numbers; why earlier candidates do not serve."""
    return {
        "ready": status.is_ready,
        "status": status.progress.phase,
        "model": None if status.model is None else model_json(status.model),
        "source": None if status.model is None else status.model.source,
        "requested": status.requested,
        "progress": asdict(status.progress),
        "passed_over": [asdict(candidate) for candidate in status.passed_over],
        "offered": list(status.offered),
        "loaded": list(status.loaded),
        "running": status.running,
        "waiting": status.waiting,
    }
