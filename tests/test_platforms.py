"""What the platforms' files and pages name exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from serve.settings import VARIABLES

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "platforms").glob("*.md"))
KNOWN = {name for name, _, _ in VARIABLES}
FOREIGN = {"HF_TOKEN", "GRADIO_ROOT_PATH", "GIT_SSH_COMMAND"}  # other libraries' own


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_variable_on_a_platforms_page_is_a_setting(page: Path) -> None:
    named = set(re.findall(r"\b([A-Z]{2,}(?:_[A-Z]+)+)\b", page.read_text()))
    assert named <= KNOWN | FOREIGN, named - KNOWN - FOREIGN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_on_a_platforms_page_is_there(page: Path) -> None:
    named = re.findall(r"`([\w./-]+\.(?:py|txt|json)|Dockerfile|scripts/\w+)`", page.read_text())
    assert all((ROOT / name).exists() for name in named), named


def test_there_is_a_page_for_each_platform() -> None:
    assert {page.stem for page in PAGES} == {
        "openxlab", "spaces", "modelscope", "machine", "container"
    }  # fmt: skip


def test_the_modelscope_file_names_our_gradio_and_real_settings() -> None:
    described = json.loads((ROOT / "ms_deploy.json").read_text())
    assert described["sdk_type"] == "gradio" and described["sdk_version"] == pinned("gradio")
    assert "py311" in described["base_image"]
    assert {v["name"] for v in described["environment_variables"]} <= KNOWN


def test_the_container_runs_the_app_as_an_ordinary_user_on_its_port() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    assert "pip install --no-cache-dir -r requirements.txt" in lines
    assert lines.index("USER app") < lines.index('CMD ["python", "app.py"]')
    assert "EXPOSE 7860" in lines and "/health" in lines
    assert re.search(r"FROM python:3\.1[12]", lines)
    assert set(re.findall(r"(\w+)=", lines.split("ENV ")[1].split("\n")[0])) <= KNOWN


def test_packages_txt_holds_what_the_lfs_source_runs() -> None:
    assert set((ROOT / "packages.txt").read_text().split()) >= {"git", "git-lfs"}
