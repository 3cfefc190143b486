"""docs/api.md's tables of request fields and limits, made from what the code checks.

`python -m serve.wire.tables docs/api.md` rewrites them; a test holds the file to them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from serve.wire.bounds import BODY_BYTES, LIMITS
from serve.wire.fields_chat import CHAT
from serve.wire.fields_completions import COMPLETIONS
from serve.wire.fields_responses import RESPONSES

TABLES = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSES,
    "/v1/completions": COMPLETIONS,
}


def fields_markdown() -> str:
    """Every request field of the three routes: honoured, harmless or refused."""
    lines: list[str] = []
    for route, table in TABLES.items():
        lines += [f"`POST {route}`", "", "| field | | |", "|---|---|---|"]
        for row in table:
            extra = " (extension)" if row.is_extra else ""
            lines.append(f"| `{row.name}` | {row.standing}{extra} | {row.says} |")
        lines.append("")
    return "\n".join(lines)


def limits_markdown() -> str:
    """What one request may ask for at most; more is a 400, a larger body a 413."""
    lines = ["| at most | of |", "|---|---|", f"| {BODY_BYTES:,} | bytes of body |"]
    lines += [f"| {limit.most:,} | {limit.what} |" for limit in LIMITS]
    return "\n".join(lines) + "\n"


def rewritten(page: str) -> str:
    """`page` with its two generated parts as they are now."""
    for name, made in (("limits", limits_markdown()), ("fields", fields_markdown())):
        part = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
        page = part.sub(lambda found, made=made: f"{found[1]}{made}{found[2]}", page)  # type: ignore[misc]
    return page


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(rewritten(target.read_text()))
