"""What happens when app.py is started by a Python that is too old for it.

Platforms' images may hold Python 3.9. This file runs there (3.7 and up): it says in one sentence
what is needed, then makes an environment with a newer Python (one that is installed, else one that
uv fetches), installs requirements.txt into it and goes on as that Python. Imports nothing of ours.
Called by app.py only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys

NEEDED = (3, 11)
CANDIDATES = ("python3.12", "python3.11")
UV = "uv>=0.5"
OLDEST_GLIBC = (2, 28)  # what torch's wheels are built for
HOW = (
    "Choose an image with Python 3.11 or 3.12, or run `pip install uv`, "
    "`uv venv --python 3.11 .venv`, `uv pip install -r requirements.txt` and "
    "`.venv/bin/python app.py`."
)


def restart_with_newer_python(script: str) -> None:
    """Replace this process by `script` under Python 3.11 or newer, or end it saying what to do."""
    folder = os.path.dirname(os.path.abspath(script))
    said = "This app needs Python 3.11 or 3.12; this is Python {}.{}.{}.".format(
        *sys.version_info[:3]
    )
    _say(said)
    old = _old_system()
    if old:
        _give_up(old)
    try:
        python = prepared_python(folder)
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        _give_up(f"A newer Python could not be set up here ({_words(error)}).")
        return
    _say(f"Going on with {python}.")
    os.execv(python, [python, script] + sys.argv[1:])


def prepared_python(folder: str) -> str:
    """Path of a Python with everything in requirements.txt; made on the first start, then kept."""
    requirements = os.path.join(folder, "requirements.txt")
    with open(requirements, "rb") as stored:
        mark = hashlib.sha256(stored.read()).hexdigest()
    home = _writable(folder)
    environment = os.path.join(home, ".venv-newer")
    python = os.path.join(environment, "bin", "python")
    done = os.path.join(environment, ".done")
    if os.path.exists(done) and open(done).read() == mark and os.path.exists(python):
        return python
    newer = _installed()
    if newer:
        _say(f"Making an environment with {newer} (some minutes, once).")
        _run([newer, "-m", "venv", "--clear", environment])
        _run([python, "-m", "pip", "install", "--quiet", "-r", requirements])
    else:
        _say("Fetching Python 3.11 with uv (some minutes, once).")
        uv = _uv(home)
        _run([uv, "venv", "--clear", "--seed", "--python", "3.11", environment])
        _run([uv, "pip", "install", "--python", python, "-r", requirements])
    with open(done, "w") as out:
        out.write(mark)
    return python


def _installed() -> str:
    """A newer Python on the PATH that really runs, or nothing."""
    for name in CANDIDATES:
        path = shutil.which(name)
        if path and subprocess.call([path, "-c", "import venv"], stderr=subprocess.DEVNULL) == 0:
            return path
    return ""


def _uv(home: str) -> str:
    found = shutil.which("uv")
    if found:
        return found
    tools = os.path.join(home, ".uv")
    path = os.path.join(tools, "bin", "uv")
    if not os.path.exists(path):
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", tools, UV])
    return path


def _writable(folder: str) -> str:
    if os.access(folder, os.W_OK):
        return folder
    home = os.path.join(os.path.expanduser("~"), ".cache", "gpt-oss-app")
    os.makedirs(home, exist_ok=True)
    return home


def _old_system() -> str:
    """Why no Python helps here: libraries that are older than torch's wheels, or nothing."""
    library, version = platform.libc_ver()
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if library != "glibc" or len(parts) < 2 or parts >= OLDEST_GLIBC:
        return ""
    return (
        "This system's C library is glibc {}; torch needs {}.{} "
        "(Ubuntu 20.04, Debian 10 or newer).".format(version, *OLDEST_GLIBC)
    )


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=3600)


def _words(error: BaseException) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return "`{}` failed".format(" ".join(error.cmd[:4]))
    return str(error)


def _give_up(reason: str) -> None:
    _say(reason)
    _say(HOW)
    sys.exit(2)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
