"""README and docs say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from serve.settings import VARIABLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readmes_generated_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "readme.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_every_setting_stands_in_readmes_table_with_its_meaning() -> None:
    for name, meaning, _ in VARIABLES:
        assert f"| `{name}` |" in README
        assert meaning.replace("|", "\\|") in README


def test_every_link_to_a_file_leads_to_one() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_requirements_are_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"[\w\[\]-]+==[\w.]+", line), f"{name}: {line}"
