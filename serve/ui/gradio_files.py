"""What Gradio's script will fetch for our page, known before the browser learns of it.

Its front end loads in a chain (entry, app, blocks, each component's files), a round trip each;
named in the page's head all of it comes at once. And its box brings a library for streamed video, a
third of all bytes, which a chat has no use for: an import map puts an empty one in its place. Both
are read from the files of the installed Gradio, by the form that its build gives them; where that
is not found, nothing is said and the page loads as any Gradio page. Used by first_paint.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

COMPONENTS = ("html", "state", "multimodaltextbox")
_LIST = re.compile(r"m\.f=\[([^\]]*)\]")
_LAZY = re.compile(r"import\([`\"']\./([\w.-]+)[`\"']\)[^_]{0,40}__vite__mapDeps\(\[([\d,]*)\]\)")
_STREAMING = re.compile(r"export\{([^}]*)\}\s*;?\s*$")


def folder() -> Path:
    import gradio

    return Path(gradio.__file__).parent / "templates" / "frontend" / "assets"


@cache
def chain(assets: Path, components: tuple[str, ...] = COMPONENTS) -> tuple[str, ...]:
    """Names of the files, scripts and styles, in the order of their need; () where not found."""
    entry = _entry(assets)
    found: dict[str, None] = {}
    if entry is None:
        return ()
    for name in (*_all(assets / entry), *_blocks(assets), *_components(assets, components)):
        found.setdefault(name)
    return tuple(name for name in found if name != entry and not name.startswith("hls-"))


@cache
def streaming(assets: Path) -> tuple[str, str] | None:
    """The name of the library for streamed video and a module that exports the same names, each a
    function that says no."""
    for file in assets.glob("hls-*.js"):
        exported = _STREAMING.search(file.read_text())
        if exported is not None:
            names = re.findall(r"(?:\w+ as )?(\w+)(?:,|$)", exported[1])
            told = ", ".join(f"no as {name}" for name in names)
            return file.name, f"const no = () => false;\nexport {{ {told} }};\n"
    return None


def _entry(assets: Path) -> str | None:
    page = assets.parent / "index.html"
    found = re.search(r'src="\./assets/(index-[\w-]+\.js)"', page.read_text())
    return found[1] if found and (assets / found[1]).is_file() else None


def _all(file: Path) -> list[str]:
    """All that `file` names as its lazy parts' files."""
    listed = _LIST.search(file.read_text())
    return [] if listed is None else re.findall(r"\./([\w.-]+)", listed[1])


def _lazy(text: str, names: list[str], wanted: str = "") -> Iterable[str]:
    """What the lazy parts in `text` whose names begin with `wanted` need, themselves among it."""
    for part, numbers in _LAZY.findall(text):
        if part.startswith(wanted):
            yield part
            yield from (names[int(n)] for n in numbers.split(",") if n and int(n) < len(names))


def _blocks(assets: Path) -> Iterable[str]:
    for file in assets.glob("Index-*.js"):
        text = file.read_text()
        if "./Blocks-" in text:
            yield from _lazy(text, _all(file), "Blocks-")


def _components(assets: Path, components: tuple[str, ...]) -> Iterable[str]:
    for file in assets.glob("core-*.js"):
        text = file.read_text()
        for name in components:
            if found := re.search(rf"[,{{]{name}:\{{([^{{}}]*)\}}", text):
                yield from _lazy(found[1], _all(file))
