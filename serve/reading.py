"""A folder or a GGUF file on disk as a LoadedModel: planned, read with its progress told, complete.

Everything a chat needs is found here or said to be missing. Knows no hubs and no downloads. Called
by loader.py on the loading thread; torch is imported on the way, not when this module is.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.quantization.arrival import Arrived
from serve.quantization.machine import Machine, can_hold_mxfp4
from serve.quantization.plan import Plan, Refused, Weights, plan, plan_gguf
from serve.settings import Settings
from serve.sources.meter import Meter, Report

if TYPE_CHECKING:
    from serve.model import LoadedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Read:
    """What a form of storage gives: the model in eval mode, and what only its files say."""

    model: Any
    tokenizer: Any
    stated_ends: set[int]
    processor: Any | None = None
    vision: bool | None = False


def gguf_in(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    return found[0] if found and not any(path.glob("*.safetensors")) else None


def name_of(path: Path) -> str:
    """The model's name: of a hub cache's snapshot folder, else the folder's or file's own."""
    for part in path.absolute().parts:
        if match := re.fullmatch(r"(?:models--)?([\w.]+(?:-[\w.]+)*)--([\w.-]+)", part, re.ASCII):
            return f"{match[1]}/{match[2]}"
    return path.absolute().resolve().stem if path.is_file() else path.absolute().resolve().name


def sees(config: dict[str, Any]) -> bool | None:
    """Whether a model of that configuration is made for images; None for one that is not known."""
    from serve.quantization.folder import sees_images

    try:
        return sees_images(config) if config else False
    except Refused:
        return None


class Reader:
    """Reads models for `machine`, as it was before a model of ours took its memory."""

    def __init__(self, settings: Settings, machine: Machine, report: Report) -> None:
        self._settings = settings
        self._machine = machine
        self._report = report

    def plan(self, weights: Weights) -> Plan:
        """How the weights will be held. Raises Refused with the numbers."""
        machine, wanted = self._machine, self._settings.quant_type
        return plan(weights, wanted, machine, can_hold_mxfp4=can_hold_mxfp4(machine))

    def plan_gguf(self, name: str, stored_bytes: int) -> Plan:
        return plan_gguf(name, stored_bytes, self._settings.quant_type, self._machine)

    def plan_path(self, path: Path) -> tuple[Plan, dict[str, Any]]:
        """The plan and the configuration ({} of a GGUF file) of what lies there."""
        from serve.quantization.folder import read_weights

        gguf = gguf_in(path)
        if gguf is not None:
            return self.plan_gguf(gguf.name, gguf.stat().st_size), {}
        weights = read_weights(path)
        return self.plan(weights), dict(weights.config)

    def read(self, path: Path, name: str, source: str) -> LoadedModel:
        """The model there. Raises Refused."""
        gguf = gguf_in(path)
        stored = gguf or path
        if gguf is None and not path.is_dir():
            fix = "Set MODEL_LOCAL_PATH to a folder or a .gguf file."
            raise Refused(f"{path.name} is neither a folder nor a .gguf file", fix)
        chosen, _ = self.plan_path(path)
        meter = Meter(self._report, name, source, _stored_bytes(stored), phase="loading")
        meter.detail = "reading the weights"
        with meter:
            if gguf is not None:
                found = _read_gguf(gguf, chosen, meter.add)
            else:
                found = self._read_folder(path, name, chosen, meter.add)
        return self._complete(found, chosen, name, source, stored)

    def _read_folder(self, folder: Path, name: str, chosen: Plan, arrived: Arrived) -> _Read:
        from serve.quantization import folder as reading
        from serve.quantization.processor import load_processor

        config = reading.read_config(folder)
        tokenizer = reading.load_tokenizer(folder)
        reading.need_template(tokenizer, name)
        vision = reading.sees_images(config)
        processor = load_processor(folder) if vision is not False else None
        if vision and processor is None:
            vision = None
        shows = vision is not False and processor is not None
        device = self._machine.device
        model = reading.load_weights(folder, config, chosen, device, vision=shows, arrived=arrived)
        ends = reading.stated_ends(folder, config)
        return _Read(model, tokenizer, ends, processor, vision)

    def _complete(
        self, found: _Read, chosen: Plan, name: str, source: str, stored: Path
    ) -> LoadedModel:
        import torch

        from serve.model import LoadedModel
        from serve.quantization import folder as reading

        reading.need_template(found.tokenizer, name)
        model = found.model
        if chosen.method == "int8":
            from serve.quantization.linear8 import to_int8

            model = to_int8(model)
        length, guessed = reading.context_length(model.config, found.tokenizer)
        device = torch.device(self._machine.device)
        for note in chosen.notes:
            log.info("%s: %s", name, note)
        return LoadedModel(
            id=name,
            model=model.to(device) if model.device.type != device.type else model,
            tokenizer=found.tokenizer,
            context_length=min(length, self._settings.max_context or length),
            eos_ids=reading.end_ids(found.stated_ends, found.tokenizer),
            device=device,
            dtype=torch.float32 if chosen.method == "int8" else getattr(torch, chosen.dtype),
            source=source,
            folder=stored,
            processor=found.processor,
            vision=found.vision,
            quantization={"full": "none", "gguf": "none"}.get(chosen.method, chosen.method),
            notes=(*chosen.notes, *([guessed] if guessed else [])),
        )


def _read_gguf(path: Path, chosen: Plan, arrived: Arrived) -> _Read:
    import torch

    from serve.quantization.gguf import load_gguf

    try:
        model, tokenizer = load_gguf(path, getattr(torch, chosen.dtype), arrived)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        fix = "Use a file of another quantization, or a folder of safetensors."
        raise Refused(f"{path.name} cannot be read as GGUF: {error}", fix) from error
    return _Read(model.eval(), tokenizer, {model.config.eos_token_id} - {None})


def _stored_bytes(path: Path) -> int:
    from serve.quantization.folder import weight_files

    files = [path] if path.is_file() else weight_files(path)
    return sum(file.stat().st_size for file in files)
