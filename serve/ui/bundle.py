"""Our scripts as one file: a page then asks for one, not for twenty (half a second on a phone).

Each module becomes a function that returns what it exports; nothing else is changed, so what a
browser's debugger shows is the source. Takes the plain forms that our scripts use and refuses
others: named imports from "./", exported functions, classes and constants, no cycles. Used by
first_paint.py.
"""

from __future__ import annotations

import re
from pathlib import Path

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w-]+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const) (\w+))", re.MULTILINE)


def bundle(folder: Path, entry: str = "main") -> str:
    """The module `entry` of `folder` and all that it imports. Raises ValueError for a form that is
    not known here."""
    done: dict[str, str] = {}
    _add(folder, entry, done, ())
    return "".join(done.values())


def _add(folder: Path, name: str, done: dict[str, str], above: tuple[str, ...]) -> None:
    if name in done:
        return
    if name in above:
        raise ValueError(f"{name}.js imports itself by way of {' and '.join(above)}.")
    source = (folder / f"{name}.js").read_text()
    for needed in _IMPORT.findall(source):
        _add(folder, needed[1], done, (*above, name))
    exports = _EXPORT.findall(source)
    body = _EXPORT.sub("", _IMPORT.sub(_import, source))
    if left := re.search(r"^(?:import|export)\b.*", body, re.MULTILINE):
        raise ValueError(f"{name}.js: {left[0]!r} cannot be bundled.")
    done[name] = f"const ${name} = (() => {{\n{body}\nreturn {{ {', '.join(exports)} }};\n}})();\n"


def _import(found: re.Match[str]) -> str:
    names = re.sub(r"(\w+) as (\w+)", r"\1: \2", " ".join(found[1].split()))
    return f"const {{ {names} }} = ${found[2]};"
