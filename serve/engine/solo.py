"""The slower path, for a model whose forward does not fit the paged cache: one sequence at a time.

`SoloRunner` stands in the place of the paged Runner. It keeps transformers' own cache of the one
sequence that runs, gives the model's forward everything its processor made, and draws with the same
sampling. Whatever the scheduler thinks is in the cache, what is not here is computed again. Used by
seeing.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Many
from typing import Any

import torch

from serve.engine import sampling
from serve.engine.runner import Runner
from serve.engine.sampling import Draw
from serve.engine.scheduler import Chunk
from serve.engine.sequence import Sequence
from serve.engine.vision import image_token


class SoloRunner(Runner):
    """Only `run` differs: nothing is packed, nothing is paged."""

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model, None, 1, device)  # type: ignore[arg-type]
        self._taken = set(inspect.signature(model.forward).parameters)
        self._token = image_token(model.config)
        self._held = (0, 0)
        self._length = 0
        self._past: Any = None

    @torch.inference_mode()
    def run(self, chunks: Many[Chunk]) -> list[Draw]:
        (chunk,) = chunks
        sequence = chunk.sequence
        if self._held != sequence.age or self._length != chunk.start:
            self._begin(sequence, chunk.end)
        else:
            self._go_on(sequence, chunk)
        self._length = chunk.end
        if not chunk.draws:
            return []
        if sequence.matcher is None:
            return sampling.draw(self._logits, [sequence])
        mask = sampling.fill_masks([sequence], self.vocabulary)
        return sampling.draw(self._logits, [sequence], mask)

    def _begin(self, sequence: Sequence, end: int) -> None:
        """The whole prompt at once, with its pictures, then what was drawn already."""
        prompt = sequence.request.generation.prompt
        length = min(len(prompt.ids), end)
        ids = torch.tensor([prompt.ids[:length]], device=self._device)
        given: dict[str, Any] = {"input_ids": ids}
        types = (ids == self._token).int()
        if prompt.inputs is not None:
            tensors = prompt.inputs["vision"].tensors
            given |= {n: t.to(self._device) for n, t in tensors.items() if n in self._taken}
            pixels = given["pixel_values"]
            given["pixel_values"] = pixels.to(self._model.get_input_embeddings().weight.dtype)
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in self._taken:
                    given[name] = types
        self._held, self._past = sequence.age, None
        out = self._model(**given, use_cache=True, logits_to_keep=1)
        self._past, self._logits = out.past_key_values, out.logits[:, -1]
        for place in range(length, end):
            self._step(sequence.ids[place], place)

    def _go_on(self, sequence: Sequence, chunk: Chunk) -> None:
        for place in range(chunk.start, chunk.end):
            self._step(sequence.ids[place], place)

    def _step(self, token: int, place: int) -> None:
        out = self._model(
            input_ids=torch.tensor([[token]], device=self._device),
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
        )
        self._past, self._logits = out.past_key_values, out.logits[:, -1]
