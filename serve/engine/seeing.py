"""An engine for a model that sees: on the paged cache if its class fits, else one at a time.

Called by app.py in place of create_engine when the loaded model has a vision tower.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from serve.engine import windows
from serve.engine.cache import GroupSpec, KVCache
from serve.engine.config import EngineConfig
from serve.engine.engine import PagedEngine, create_engine
from serve.engine.solo import SoloRunner
from serve.engine.vision import Vision
from serve.errors import Unsupported

log = logging.getLogger(__name__)

CACHE_SHARE = 0.7
"""Of a GPU's memory that is free beside the weights."""


def create_seeing_engine(
    model: Any,
    *,
    eos_ids: Iterable[int],
    context_length: int,
    device: torch.device,
    config: EngineConfig | None = None,
) -> PagedEngine:
    """As create_engine. A class that does not fit runs one request at a time, and the log says
    why."""
    config = with_room(config or EngineConfig(), device)
    reason = misfit(model)
    if not reason:
        vision = Vision(model, device)
        try:
            engine = create_engine(
                model,
                eos_ids=eos_ids,
                context_length=context_length,
                device=device,
                inputs=vision,
                shifts=vision.shifts,
                config=config,
            )
        except Unsupported as refused:
            reason = refused.message
        else:
            keep_towers_apart(model)
            return engine
    log.warning(
        "%s runs one request at a time, slower than other models: %s", type(model).__name__, reason
    )
    model.set_attn_implementation("sdpa")
    return create_solo_engine(
        model, eos_ids=eos_ids, context_length=context_length, device=device, config=config
    )


def with_room(config: EngineConfig, device: torch.device) -> EngineConfig:
    """On a GPU the vision tower works beside the cache, and a large picture takes much more than a
    step of text, which is all that the cache's sizing tries: so the cache gets only a share."""
    if device.type != "cuda" or config.kv_cache_gb is not None:
        return config
    free, _ = torch.cuda.mem_get_info(device)
    return replace(config, kv_cache_gb=CACHE_SHARE * free / 2**30)


def misfit(model: Any) -> str:
    """Why a model's class cannot share a packed row; "" when it can."""
    core = getattr(model, "model", None)
    if core is None or not hasattr(core, "get_image_features"):
        return "it has no image features apart from its text"
    taken = inspect.signature(core.forward).parameters
    if "mm_encoder_outputs" not in taken:
        return "it does not take image features that were computed before"
    if "token_type_ids" in taken:
        return "its pictures' tokens see each other in both directions"
    return ""


def keep_towers_apart(model: Any) -> None:
    """Only the text model reads the paged cache; the vision tower attends as it always did, but
    to all its windows at once where it has some."""
    from transformers import PreTrainedModel

    windows.register()
    text = model.get_decoder()
    inside = {id(part) for part in text.modules()}
    around = {id(model), id(model.model)}
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and id(part) not in inside | around:
            part.set_attn_implementation("sdpa")
            if _has_windows(part):
                # Set so, since for this name transformers' own setter looks for a flash package.
                part.config._attn_implementation = windows.NAME


def _has_windows(tower: Any) -> bool:
    return any("cu_seqlens" in inspect.signature(m.forward).parameters for m in tower.modules())


def create_solo_engine(
    model: Any,
    *,
    eos_ids: Iterable[int],
    context_length: int,
    device: torch.device,
    config: EngineConfig | None = None,
) -> PagedEngine:
    """The same engine around a runner that keeps no pages: its books hold one block, so that
    nothing is ever shared or split."""
    config = replace(config or EngineConfig(), max_running=1, prefill_chunk=context_length + 1)
    size = context_length + 2
    runner = SoloRunner(model, device)
    engine = PagedEngine(
        runner,
        KVCache((GroupSpec(None, (0,), 2),), size, context_length + 1),
        config,
        eos_ids=frozenset(eos_ids),
        context_length=context_length,
        vocabulary=runner.vocabulary,
    )
    return engine.start()
