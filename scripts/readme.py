"""Writes README's generated parts: the tables that come from the code.

`python scripts/readme.py` rewrites them; with --check it fails when they are out of date, which a
test calls.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def settings_table() -> str:
    from serve.settings import VARIABLES

    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, meaning, default in VARIABLES:
        shown = "on" if default is True else "off" if default is False else default
        shown = "" if shown in (None, "", ()) else f"`{shown}`"
        rows.append(f"| `{name}` | {shown} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def files_tree() -> str:
    """One line a file: its docstring's first sentence."""
    files = [ROOT / name for name in ("app.py", "loader.py", "openai_compat.py")]
    lines = []
    for path in files + sorted((ROOT / "serve").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
        if docstring:
            name = str(path.relative_to(ROOT))
            sentence = " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
            lines.append(f"{name:34} {sentence}")
    return "```\n" + "\n".join(lines) + "\n```"


def fields_tables() -> str:
    from serve.wire.tables import fields_markdown

    return fields_markdown()


def limits_table() -> str:
    from serve.wire.tables import limits_markdown

    return limits_markdown()


def keywords() -> str:
    from serve.formats.grammar import supported_keywords

    return "\n".join(
        f"- {name}: " + ", ".join(f"`{word}`" for word in words)
        for name, words in supported_keywords().items()
    )


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "fields": fields_tables,
    "limits": limits_table,
    "keywords": keywords,
    "files": files_tree,
}


def rewritten(text: str) -> str:
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no part named {name}")
        made = make()
        text = pattern.sub(lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text)
    return text


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = rewritten(text)
    if "--check" in sys.argv and new != text:
        raise SystemExit("README.md is out of date: run python scripts/readme.py")
    readme.write_text(new)


if __name__ == "__main__":
    main()
