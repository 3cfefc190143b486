"""An old Python that starts app.py: it says what is needed, and goes on with a newer one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pythons(*minors: int) -> list[str]:
    """Interpreters of these versions that run here: on the PATH, or kept by pyenv."""
    found = [shutil.which(f"python3.{minor}") for minor in minors]
    for minor in minors:
        kept = Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3.{minor}")
        found += [str(path) for path in kept]
    return [
        p for p in found if p and subprocess.run([p, "-c", ""], capture_output=True).returncode == 0
    ]


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The way in of app.py, with nothing to install."""
    (tmp_path / "serve").mkdir()
    shutil.copy(ROOT / "serve" / "bootstrap.py", tmp_path / "serve")
    (tmp_path / "serve" / "__init__.py").touch()
    (tmp_path / "requirements.txt").write_text("")
    hand_over = "restart_with_newer_python(__file__)"
    before, found, _ = (ROOT / "app.py").read_text().partition(hand_over)
    assert found
    serving = 'print("serving on", sys.version_info[:2], sys.argv[1:])'
    (tmp_path / "app.py").write_text(f"{before}{hand_over}\n\n{serving}\n")
    return tmp_path / "app.py"


def start(python: str, script: Path, newer: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{Path(newer).parent}:/usr/bin:/bin", "HOME": str(script.parent)}
    return subprocess.run(
        [python, str(script), "an argument"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


OLD = pythons(10, 9, 8, 7)
NEWER = pythons(11, 12)


@pytest.mark.parametrize(
    "python",
    OLD and [OLD[0], *(pytest.param(other, marks=pytest.mark.slow) for other in OLD[1:])],
    ids=lambda python: Path(python).name,
)
def test_an_old_python_explains_and_goes_on_with_an_installed_newer_one(
    app: Path, python: str
) -> None:
    first = start(python, app, NEWER[0])
    assert "This app needs Python 3.11 or 3.12; this is Python 3." in first.stderr
    assert first.returncode == 0 and "serving on (3, 1" in first.stdout, first.stderr
    assert "['an argument']" in first.stdout
    again = start(python, app, NEWER[0])
    assert again.returncode == 0 and "Making an environment" not in again.stderr


def test_where_no_newer_python_can_be_had_it_says_what_to_do(app: Path, tmp_path: Path) -> None:
    """No newer Python on the PATH, and uv that cannot fetch one."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "uv").write_text("#!/bin/sh\nexit 1\n")
    (bin_folder / "uv").chmod(0o755)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from serve import bootstrap; "
        "bootstrap.restart_with_newer_python(sys.argv[1] + '/app.py')"
    )
    environment = {"PATH": str(bin_folder), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(app.parent)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert "could not be set up here" in done.stderr and "uv venv --python 3.11" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_system_that_is_too_old_for_torch_is_told_so(
    app: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from serve import bootstrap

    monkeypatch.setattr(bootstrap.platform, "libc_ver", lambda: ("glibc", "2.27"))
    with pytest.raises(SystemExit) as ended:
        bootstrap.restart_with_newer_python(str(app))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "glibc 2.27" in said and "2.28" in said
