"""OpenXLab's real SDK, put once into the folder that test runs keep, from whatever registry pip
has here, however slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.sources.offer import SourceFailed
from serve.sources.openxlab import install_sdk

KEPT = Path(__file__).parent.parent / ".test-cache" / "openxlab_sdk"
TRIES = 3


@pytest.fixture(scope="session")
def openxlab_sdk() -> Path:
    """Session-wide, so it comes before fixtures that cut a test off from the registry."""
    for left in reversed(range(TRIES)):
        try:
            install_sdk(KEPT)
            break
        except SourceFailed:
            if not left:
                raise
    return KEPT
