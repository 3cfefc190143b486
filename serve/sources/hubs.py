"""ModelScope and Hugging Face as one: which answers, in which order, and what a model is called.

Both are asked at once, the first time one is needed, for at most CONNECT_SECONDS together; one that
did not answer is not asked again. Called by loader.py.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import httpx

from serve.settings import Settings
from serve.sources import huggingface, modelscope
from serve.sources.http import CONNECT_SECONDS, get_json, host_of, is_answering
from serve.sources.offer import Offer, SourceFailed, Unreachable

# One model under the names that people use for it: (Hugging Face, ModelScope).
ALIASES = {
    "gpt-oss/gpt-oss-20b": ("openai/gpt-oss-20b", "openai-mirror/gpt-oss-20b"),
    "openai/gpt-oss-20b": ("openai/gpt-oss-20b", "openai-mirror/gpt-oss-20b"),
    "openai-mirror/gpt-oss-20b": ("openai/gpt-oss-20b", "openai-mirror/gpt-oss-20b"),
    "gpt-oss/gpt-oss-120b": ("openai/gpt-oss-120b", "openai-mirror/gpt-oss-120b"),
    "openai/gpt-oss-120b": ("openai/gpt-oss-120b", "openai-mirror/gpt-oss-120b"),
    "openai-mirror/gpt-oss-120b": ("openai/gpt-oss-120b", "openai-mirror/gpt-oss-120b"),
}
FIX = "Let this machine reach it, set HF_ENDPOINT to a mirror, or set MODEL_LOCAL_PATH."


class Hubs:
    """One per loading. Not thread-safe."""

    def __init__(self, client: httpx.Client, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._endpoints = {
            huggingface.NAME: settings.hf_endpoint,
            modelscope.NAME: settings.modelscope_endpoint,
        }
        self._answering: list[str] | None = None

    def order(self) -> list[str]:
        """Both hubs' names, first to try first: as HUB_ORDER says, or as they answered."""
        if self._settings.hub_order == "huggingface,modelscope":
            return [huggingface.NAME, modelscope.NAME]
        if self._settings.hub_order == "modelscope,huggingface":
            return [modelscope.NAME, huggingface.NAME]
        answering = self._who_answers()
        return [*answering, *(name for name in (modelscope.NAME, huggingface.NAME)
                              if name not in answering)]  # fmt: skip

    def reference(self, hub: str, name: str) -> str:
        """What `name` is called at `hub`."""
        both = ALIASES.get(name)
        return name if both is None else both[hub == modelscope.NAME]

    def offer(self, hub: str, name: str) -> Offer:
        """What `hub` holds for a model. Raises SourceFailed."""
        if hub not in self._who_answers():
            host = host_of(self._endpoints[hub])
            raise Unreachable(f"{hub} ({host}) cannot be reached from here", FIX)
        reference = self.reference(hub, name)
        settings = self._settings
        if hub == modelscope.NAME:
            token = settings.modelscope_api_token
            return modelscope.offer(self._client, settings.modelscope_endpoint, token, reference)
        token = settings.hf_token
        return huggingface.offer(self._client, settings.hf_endpoint, token, reference)

    def cached(self, hub: str, name: str) -> Path | None:
        """A whole copy in the hub's own cache of this user."""
        reference = self.reference(hub, name)
        return (modelscope if hub == modelscope.NAME else huggingface).cached(reference)

    def config(self, offer: Offer) -> dict[str, object]:
        """The offer's config.json, fetched alone. Raises SourceFailed."""
        file = offer.file("config.json")
        if file is None:
            raise SourceFailed(f"{offer.reference} has no config.json", "Name another model.")
        found = get_json(self._client, file.url, offer.source, "config.json", offer.headers)
        if not isinstance(found, dict):
            raise SourceFailed(f"{offer.reference}'s config.json is not a JSON object")
        return found

    def _who_answers(self) -> list[str]:
        if self._answering is None:
            self._answering = self._ask_all()
        return self._answering

    def _ask_all(self) -> list[str]:
        answered: list[str] = []
        pool = ThreadPoolExecutor(len(self._endpoints), "hub-probe")

        def ask(name: str, endpoint: str) -> None:
            if is_answering(self._client, endpoint):
                answered.append(name)

        asked: list[Future[None]] = [pool.submit(ask, *item) for item in self._endpoints.items()]
        wait(asked, timeout=CONNECT_SECONDS + 1)
        pool.shutdown(wait=False, cancel_futures=True)  # a look-up that hangs may go on alone
        return list(answered)
