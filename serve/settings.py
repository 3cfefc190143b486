"""Settings: one frozen dataclass, read once from the environment, each default in one place.

`from_env` is the only reader of os.environ in the product. A bad value raises BadSetting, whose
text is one line naming the variable, the value and what is allowed; app.py exits with code 2.
README's table of settings is checked against `VARIABLES`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

QuantType = Literal["auto", "awq", "gptq", "bnb4", "full", "mxfp4", "int8"]
KeyDisplay = Literal["auto", "owner", "guest", "off"]
HubOrder = Literal["auto", "modelscope,huggingface", "huggingface,modelscope"]
ModelSwitch = Literal["off", "owner", "all"]
ImageFallback = Literal["refuse", "drop"]
DenseBits = Literal["16", "8"]

PLATFORM_DIR = Path("/home/xlab-app-center")
RUNTIME_FOLDER = "gpt_oss_app_runtime"
SECRETS = ("app_api_key", "openxlab_ak", "openxlab_sk", "hf_token", "modelscope_api_token")
PUBLIC_MODEL_NAME = "gpt-oss:20b"


class BadSetting(ValueError):
    """A variable's value cannot be used. str() is the one line to print."""

    def __init__(self, variable: str, value: str, allowed: str) -> None:
        super().__init__(f"{variable}={value!r} cannot be used: {allowed}.")
        self.variable = variable


def _text(value: str) -> str:
    return value


def _secret(value: str) -> str:
    if len(value) < 8:
        raise ValueError("at least 8 characters")
    if not value.isprintable() or any(c.isspace() for c in value) or not value.isascii():
        raise ValueError("printable ASCII without spaces")
    return value


def _repository(value: str) -> str:
    if value and not re.fullmatch(r"[\w.-]+/[\w.-]+", value, re.ASCII):
        raise ValueError("owner/name")
    return value


def _git_address(value: str) -> str:
    if value and not re.match(r"(https|ssh)://[^\s/-][^\s]*$", value):
        raise ValueError(
            "an https:// or ssh:// address (git@host:owner/name is ssh://git@host/owner/name)"
        )
    if not _has_plain_port(value):
        raise ValueError("an address with a number as port, and with / in a password as %2F")
    return value


def _has_plain_port(address: str) -> bool:
    try:
        return urlsplit(address).port != 0
    except ValueError:
        return False


def _web_address(value: str) -> str:
    if not re.match(r"https?://[^\s/][^\s]*$", value):
        raise ValueError("an https:// or http:// address")
    return value.rstrip("/")


def _subfolder(value: str) -> str:
    if value.startswith("/") or ".." in value.split("/") or value.startswith("-"):
        raise ValueError("a folder inside the repository, such as gpt-oss-20b")
    return value.strip("/")


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _whole(low: int, high: int) -> Callable[[str], int]:
    def cast(value: str) -> int:
        if not re.fullmatch(r"\d+", value) or not low <= int(value) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)

    return cast


def _amount(low: float, high: float) -> Callable[[str], float]:
    def cast(value: str) -> float:
        if not re.fullmatch(r"\d+(\.\d+)?", value) or not low <= float(value) <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return float(value)

    return cast


def _switch(value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("on or off")


def _one_of(literal: Any) -> Callable[[str], Any]:
    choices = get_args(literal)

    def cast(value: str) -> str:
        chosen = value.lower().replace(" ", "")
        if chosen not in choices:
            raise ValueError("one of " + " | ".join(choices))
        return chosen

    return cast


def _variable(name: str, cast: Callable[[str], Any], default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"name": name, "cast": cast, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class Settings:
    app_api_key: str | None = _variable(
        "APP_API_KEY", _secret, None, "the API key; without it one is made at start"
    )
    work_dir: Path = _variable(
        "WORK_DIR",
        Path,
        None,
        "folder for runtime data; default: the platform's folder, else a per-user one",
    )
    model_local_path: str = _variable(
        "MODEL_LOCAL_PATH", _text, "", "folder or .gguf file with model files; wins over everything"
    )
    openxlab_model_repo: str = _variable(
        "OPENXLAB_MODEL_REPO", _repository, "", "OpenXLab model repository, `owner/name`"
    )
    openxlab_endpoint: str = _variable(
        "OPENXLAB_ENDPOINT",
        _web_address,
        "https://openapi.openxlab.org.cn/api/v1",
        "OpenXLab's API address",
    )
    openxlab_ak: str = _variable("OPENXLAB_AK", _text, "", "OpenXLab access key")
    openxlab_sk: str = _variable("OPENXLAB_SK", _text, "", "OpenXLab secret key")
    openxlab_model_repo_url: str = _variable(
        "OPENXLAB_MODEL_REPO_URL", _git_address, "", "Git LFS mirror of a model, https or ssh"
    )
    openxlab_model_subdir: str = _variable(
        "OPENXLAB_MODEL_SUBDIR", _subfolder, "", "folder of the model inside that repository"
    )
    modelscope_id: str = _variable(
        "MODELSCOPE_ID", _repository, "", "a ModelScope id, tried before the list"
    )
    model_ids: tuple[str, ...] = _variable(
        "MODEL_IDS", _names, (), "comma-separated ids or paths in order of preference"
    )
    hf_model_id: str = _variable(
        "HF_MODEL_ID", _repository, "gpt-oss/gpt-oss-20b", "last remote resort"
    )
    hf_endpoint: str = _variable(
        "HF_ENDPOINT", _web_address, "https://huggingface.co", "Hugging Face or a mirror of it"
    )
    hf_token: str = _variable("HF_TOKEN", _text, "", "Hugging Face token, for gated models")
    modelscope_endpoint: str = _variable(
        "MODELSCOPE_ENDPOINT", _web_address, "https://modelscope.cn", "ModelScope's address"
    )
    modelscope_api_token: str = _variable(
        "MODELSCOPE_API_TOKEN", _text, "", "ModelScope token, for private models"
    )
    hub_order: HubOrder = _variable(
        "HUB_ORDER",
        _one_of(HubOrder),
        "auto",
        "which hub first: " + " | ".join(get_args(HubOrder)) + "; auto: the one that answers first",
    )
    quant_type: QuantType = _variable(
        "QUANT_TYPE",
        _one_of(QuantType),
        "auto",
        "how weights are held: " + " | ".join(get_args(QuantType)),
    )
    dense_bits: DenseBits = _variable(
        "DENSE_BITS",
        _one_of(DenseBits),
        "16",
        "bits of gpt-oss's attention and vocabulary weights on a GPU: 16 (as stored) | 8 (faster)",
    )
    model_switch: ModelSwitch = _variable(
        "MODEL_SWITCH",
        _one_of(ModelSwitch),
        "owner",
        "who may switch between several MODEL_IDS: off | owner | all",
    )
    host: str = _variable("HOST", _text, "0.0.0.0", "address to listen on")
    port: int = _variable("PORT", _whole(1, 65535), 7860, "port; a busy one is an error")
    key_display: KeyDisplay = _variable(
        "KEY_DISPLAY",
        _one_of(KeyDisplay),
        "auto",
        "which API key the page shows: auto | owner | guest | off",
    )
    kv_cache_gb: float | None = _variable(
        "KV_CACHE_GB", _amount(0.01, 4096), None, "memory for the KV cache; default: measured"
    )
    max_context: int | None = _variable(
        "MAX_CONTEXT",
        _whole(128, 10_000_000),
        None,
        "shorten the model's context to this many tokens",
    )
    allow_image_urls: bool = _variable(
        "ALLOW_IMAGE_URLS", _switch, False, "fetch http(s) images that requests name"
    )
    image_fallback: ImageFallback = _variable(
        "IMAGE_FALLBACK",
        _one_of(ImageFallback),
        "refuse",
        "API images for a text-only model: refuse (400) | drop (answer from the text)",
    )
    rate_limit_requests: int = _variable(
        "RATE_LIMIT_REQUESTS", _whole(0, 10_000_000), 0, "requests per minute and key; 0: no limit"
    )
    rate_limit_tokens: int = _variable(
        "RATE_LIMIT_TOKENS", _whole(0, 10**10), 0, "tokens per minute and key; 0: no limit"
    )
    is_zero_gpu: bool = _variable(
        "SPACES_ZERO_GPU", _switch, False, "set by Hugging Face on ZeroGPU: one request at a time"
    )
    rate_limit_concurrent: int = _variable(
        "RATE_LIMIT_CONCURRENT", _whole(0, 100_000), 0, "requests at once per key; 0: no limit"
    )

    @property
    def runtime_dir(self) -> Path:
        return self.work_dir / RUNTIME_FOLDER


VARIABLES: tuple[tuple[str, str, Any], ...] = tuple(
    (f.metadata["name"], f.metadata["meaning"], f.default) for f in fields(Settings)
)
"""Name, meaning and default of each variable, for README's table."""


def from_env(environ: Mapping[str, str] | None = None) -> Settings:
    """Read every variable once. An empty value counts as unset. Raises BadSetting."""
    source = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for f in fields(Settings):
        variable = f.metadata["name"]
        given = source.get(variable, "").strip()
        if not given:
            continue
        try:
            values[f.name] = f.metadata["cast"](given)
        except ValueError as wrong:
            shown = "***" if f.name in SECRETS else given
            raise BadSetting(variable, _masked(shown), f"allowed is {wrong}") from None
    if values.get("is_zero_gpu") and not source.get("SPACES_ZERO_DEVICE_API_URL"):
        hint = "Hugging Face sets it where it lends GPUs, with SPACES_ZERO_DEVICE_API_URL"
        raise BadSetting("SPACES_ZERO_GPU", source["SPACES_ZERO_GPU"], hint)
    values.setdefault("work_dir", _default_work_dir(source))
    return Settings(**values)


def prepare_libraries(settings: Settings) -> None:
    """Say to libraries, before they are imported, what they only take from the environment.

    A variable that the operator set stays as it is.
    """
    wanted = {
        # Threads that spin while they wait starve the server's own (docs/decisions.md).
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_ENDPOINT": settings.hf_endpoint,
        # No kernels and no code from a hub at load time.
        "USE_HUB_KERNELS": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        # Of a registry that is out of reach (pip waits 15 s each time) another source is heard of.
        "PIP_RETRIES": "2",
    }
    if settings.hf_endpoint != Settings.__dataclass_fields__["hf_endpoint"].default:
        wanted["HF_HUB_DISABLE_XET"] = "1"  # Xet's hosts are not behind a mirror
    if settings.is_zero_gpu:
        # There CUDA is emulated on the main thread only, until a worker has a GPU.
        wanted["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    for variable, value in wanted.items():
        os.environ.setdefault(variable, value)
    # Gradio asks its own page over HTTP while it starts; a proxy must not get that.
    for variable in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(variable, "").split(",") if host]
        os.environ[variable] = ",".join(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]))


def _masked(address: str) -> str:
    return re.sub(r"//\S*@", "//***@", address)


def _default_work_dir(source: Mapping[str, str]) -> Path:
    if PLATFORM_DIR.is_dir() and os.access(PLATFORM_DIR, os.W_OK):
        return PLATFORM_DIR
    data_home = source.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data_home) / "gpt-oss-app"
