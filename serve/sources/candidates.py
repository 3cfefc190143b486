"""Which models the settings name, in the order in which they are tried, and what is known of some
without asking anybody.

No network. Called by loader.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve.settings import Settings
from serve.sources import embedded
from serve.sources.offer import masked


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that the settings name, and by which variable."""

    kind: Literal["local", "openxlab", "lfs", "hub", "modelscope", "embedded"]
    name: str
    setting: str


def candidates(settings: Settings) -> tuple[Candidate, ...]:
    """In the order in which they are tried."""
    found: list[Candidate] = []
    if settings.model_local_path:
        found.append(Candidate("local", settings.model_local_path, "MODEL_LOCAL_PATH"))
    if settings.openxlab_model_repo:
        found.append(Candidate("openxlab", settings.openxlab_model_repo, "OPENXLAB_MODEL_REPO"))
    if settings.openxlab_model_repo_url:
        url = settings.openxlab_model_repo_url
        found.append(Candidate("lfs", masked(url), "OPENXLAB_MODEL_REPO_URL"))
    if settings.modelscope_id:
        found.append(Candidate("modelscope", settings.modelscope_id, "MODELSCOPE_ID"))
    for name in settings.model_ids:
        is_path = Path(name).expanduser().exists()
        found.append(Candidate("local" if is_path else "hub", name, "MODEL_IDS"))
    if settings.hf_model_id:
        found.append(Candidate("hub", settings.hf_model_id, "HF_MODEL_ID"))
    found.append(Candidate("embedded", embedded.REFERENCE, "the embedded default"))
    once: dict[tuple[str, str], Candidate] = {}
    for candidate in found:
        once.setdefault((candidate.kind, candidate.name), candidate)
    return tuple(once.values())


def without_effect(settings: Settings) -> tuple[str, ...]:
    """What is set and does nothing because its other half is missing, in words for the log."""
    found = []
    if bool(settings.openxlab_ak) != bool(settings.openxlab_sk):
        one, other = ("AK", "SK") if settings.openxlab_ak else ("SK", "AK")
        found.append(f"OPENXLAB_{one} has no effect without OPENXLAB_{other}")
    elif settings.openxlab_ak and not settings.openxlab_model_repo:
        found.append("OPENXLAB_AK and OPENXLAB_SK have no effect without OPENXLAB_MODEL_REPO")
    if settings.openxlab_model_subdir and not settings.openxlab_model_repo_url:
        found.append("OPENXLAB_MODEL_SUBDIR has no effect without OPENXLAB_MODEL_REPO_URL")
    return tuple(found)


def is_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model's stored weights and what of its config says how much memory it takes."""

    bytes: int
    config: Mapping[str, Any]


def _gpt_oss(stored_bytes: int, layers: int, experts: int) -> KnownModel:
    return KnownModel(
        stored_bytes,
        {
            "model_type": "gpt_oss",
            "num_hidden_layers": layers,
            "num_local_experts": experts,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "vocab_size": 201088,
            "quantization_config": {"quant_method": "mxfp4"},
        },
    )


KNOWN = {
    "openai/gpt-oss-20b": _gpt_oss(13_761_264_768, 24, 32),
    "openai/gpt-oss-120b": _gpt_oss(65_248_815_744, 36, 128),
}
