"""What turns pictures and text into a model's inputs, loaded without torchvision.

A processor of transformers also wants a video processor, which exists for torchvision only; its
builds do not load beside every torch, and nothing here shows videos. So the class is loaded with
its video part left out, and the image part that Pillow drives. Used by the loader.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import sys
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

log = logging.getLogger(__name__)

_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
# Their own call cannot tell a user's control tokens from the template's; the common one can.
_OWN_CALL = ("Idefics3Processor",)
_FAILS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)


def load_processor(folder: Path) -> Any | None:
    """The folder's processor, or None (and a warning) when it has none that can be loaded."""
    try:
        processor = _load(folder)
    except _FAILS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning("The model could see, but its image processor fails: %s", reason[:300])
        return None
    if hasattr(processor, "image_processor") and _shows_pictures(processor):
        return processor
    log.warning("The model could see, but its chat template has no place for a picture.")
    return None


def _shows_pictures(processor: Any) -> bool:
    """Whether its chat template writes something where a content part says "image"."""
    words = {"type": "text", "text": "x"}
    try:
        plain, shown = (
            processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
            for parts in ([words], [{"type": "image"}, words])
        )
    except (TemplateError, *_FAILS):
        return False
    return bool(plain != shown)


def _load(folder: Path) -> Any:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    name = _named_class(folder)
    if name not in _class_names().values():
        name = _class_names()[AutoConfig.from_pretrained(folder, **local).model_type]
    kind = processor_class(str(name))
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil", **local),
        "tokenizer": AutoTokenizer.from_pretrained(folder, **local),
    }
    settings, _ = kind.get_processor_dict(folder, local_files_only=True)
    return make_processor(kind, parts, settings)


def _named_class(folder: Path) -> str | None:
    for name in _FILES:
        path = folder / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8")).get("processor_class")
            if found:
                return str(found)
    return None


def _class_names() -> dict[str, str]:
    """From a model's type to its processor's class."""
    from transformers.models.auto import processing_auto

    return dict(processing_auto.PROCESSOR_MAPPING_NAMES)  # type: ignore[attr-defined]


def processor_class(name: str) -> Any:
    """transformers' class of that name. One that takes a resizing rule from its torchvision module
    gets the same rule from the Pillow module, when torchvision is not there."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.processing_auto import processor_class_from_name

    kind = processor_class_from_name(name)
    if not getattr(kind, "is_dummy", False):
        return kind
    model = next(kept for kept, named in _class_names().items() if named == name)
    stem = model_type_to_module_name(model)
    package = f"transformers.models.{stem}"
    for_pillow = importlib.import_module(f"{package}.image_processing_pil_{stem}")
    sys.modules.setdefault(f"{package}.image_processing_{stem}", for_pillow)
    return getattr(importlib.import_module(f"{package}.processing_{stem}"), name)


def make_processor(kind: Any, parts: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A processor of class `kind` from its image part and its tokenizer. `settings` is what
    processor_config.json holds; what of it the class does not take is left alone."""
    module = sys.modules[kind.__module__]
    if getattr(module, "num2words", ...) is None:
        module.num2words = str  # type: ignore[attr-defined]  # a package for videos' prompts only
    wanted = kind.get_attributes()
    arguments = set(inspect.signature(kind.__init__).parameters) | {"chat_template"}
    taken = {
        name: value
        for name, value in settings.items()
        if name in arguments and name not in (*wanted, "kwargs")
    }
    return _without_video(kind)(**{name: parts.get(name) for name in wanted}, **taken)


def _without_video(kind: Any) -> Any:
    """A subclass of the same name whose parts are its images and its text."""
    from transformers import ProcessorMixin

    def kept(cls: Any) -> list[str]:
        return [part for part in kind.get_attributes() if part in ("image_processor", "tokenizer")]

    changed: dict[str, Any] = {
        "get_attributes": classmethod(kept),
        "video_processor": _NoVideo(),
        # It looks for truncation, which is never asked for, and counts what users write.
        "_check_special_mm_tokens": lambda self, *_args, **_named: None,
    }

    def laid_out(self: Any, images: Any = None, text: Any = None, **more: Any) -> tuple[Any, ...]:
        return (*kind.prepare_inputs_layout(self, images=images, text=text)[:2], None, None)

    if kind.__name__ in _OWN_CALL:
        changed |= {
            "__call__": ProcessorMixin.__call__,
            "prepare_inputs_layout": laid_out,
            "unused_input_names": ["rows", "cols"],
        }
    return type(kind.__name__, (kind,), changed)


class _NoVideo:
    """Stands where the video part would: it is asked for its settings, never for frames."""

    model_input_names: tuple[str, ...] = ()
    num_frames = 0
    fps = 0
    merge_size = 1
