"""A loaded model: weights, tokenizer, processor, and what was read from them.

Made by loader.py, read by app.py to build the engine and the format. Knows no requests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from serve.values import Capabilities, ModelCard, Sampling


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """`model` is the stock transformers class in eval mode on `device`; `eos_ids` is never empty.

    `quantization` says how the weights are held ("none", "mxfp4", "int8", …), `source` in words
    where they came from, `folder` the local folder or .gguf file they were read from.
    """

    id: str
    model: Any
    tokenizer: Any
    context_length: int
    eos_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    source: str
    folder: Path | None = None
    processor: Any | None = None
    vision: bool | None = None
    quantization: str = "none"
    notes: tuple[str, ...] = field(default=())

    @property
    def model_type(self) -> str:
        return str(self.model.config.model_type)

    def card(self, spoken: Capabilities) -> ModelCard:
        """`spoken` is what the chat format can do; seeing is the model's own."""
        return ModelCard(
            id=self.id,
            context_length=self.context_length,
            capabilities=Capabilities(self.vision, spoken.tools, spoken.reasoning, spoken.efforts),
            created=int(time.time()),
            source=self.source,
            quantization=self.quantization,
            device=str(self.device),
            parameters=sum(p.numel() for p in self.model.parameters()),
            defaults=self._defaults(),
        )

    def _defaults(self) -> Sampling:
        """What the model's generation_config states; 0 for one that wants greedy."""
        stated = self.model.generation_config
        known = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(stated, name, None)) is not None
        }
        if stated.do_sample is False and "temperature" not in known:
            known["temperature"] = 0.0
        return Sampling(**known)
