"""Every word of the page exists in both languages, and every word that is asked for exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

from serve import errors
from serve.errors import ServeError

ASSETS = Path(__file__).parent.parent / "assets"
SCRIPTS = sorted((ASSETS / "js").glob("*.js"))
# Keys that are put together at run time, each with what it is put together from.
BUILT = {
    "effort_": ["none", "minimal", "low", "medium", "high", "xhigh", "max", "default"],
    "state_": ["starting", "downloading", "loading", "warming", "failed", "ready"],
    "theme_": ["system", "light", "dark", "now"],
    "key_": ["owner", "guest", "operator", "off", "failed"],
}


def texts() -> dict[str, dict[str, str]]:
    source = (ASSETS / "js" / "texts.js").read_text()
    found = re.search(r"export const TEXTS = (\{.*?\n\});?\n", source, re.DOTALL)
    assert found is not None
    languages: dict[str, dict[str, str]] = json.loads(found[1])
    return languages


def all_errors(kind: type[ServeError] = ServeError) -> list[type[ServeError]]:
    return [kind, *(e for child in kind.__subclasses__() for e in all_errors(child))]


def test_both_languages_have_the_same_words_with_the_same_blanks() -> None:
    english, chinese = texts()["en"], texts()["zh-CN"]
    assert english.keys() == chinese.keys()
    for key in english:
        blanks = [sorted(re.findall(r"\{\w+\}", words[key])) for words in (english, chinese)]
        assert blanks[0] == blanks[1], key
        assert chinese[key].strip() and english[key].strip(), key


def test_chinese_is_chinese() -> None:
    same = {key for key, words in texts()["zh-CN"].items() if words == texts()["en"][key]}
    assert same == {"context", "top_p"}  # numbers and a name


def asked_for() -> set[str]:
    keys = {prefix + end for prefix, ends in BUILT.items() for end in ends}
    for script in SCRIPTS:
        source = script.read_text()
        keys |= set(re.findall(r"""\bt\(\s*"(\w+)"[,)]""", source))
        for choice in re.findall(r"\bt\(([^()]*\?[^()]*)[,)]", source):
            keys |= set(re.findall(r'"(\w+)"', choice))
    shell = (ASSETS / "shell.html").read_text()
    keys |= set(re.findall(r'data-t(?:-label)?="(\w+)"', shell))
    return {key for key in keys if not key.endswith("_")} - {"user"}  # a role, not a word


def test_every_word_that_is_asked_for_exists() -> None:
    assert asked_for() - texts()["en"].keys() == set()


def test_every_error_and_every_note_has_its_words() -> None:
    english = texts()["en"]
    for error in all_errors():
        shown = f"error_{error.code}" if f"error_{error.code}" in english else "error_server_error"
        assert f"{shown}_do" in english
    told = {error.code for error in all_errors()} & {
        key.removeprefix("error_") for key in english if key.startswith("error_")
    }
    assert {"overloaded", "out_of_memory", "context_length_exceeded", "model_loading"} <= told
    source = (Path(errors.__file__).parent / "ui" / "attachments.py").read_text()
    assert set(re.findall(r'"(file_\w+)"', source)) <= english.keys()


def test_no_word_is_left_over() -> None:
    everything = "".join(script.read_text() for script in SCRIPTS if script.name != "texts.js")
    everything += (ASSETS / "shell.html").read_text()
    used = asked_for() | {"duration_seconds", "duration_minutes"}
    server = {key for key in texts()["en"] if key.startswith(("error_", "file_", "images_not"))}
    left = {key for key in texts()["en"].keys() - used - server if f'"{key}"' not in everything}
    # These are put together in settings.js.
    hints = {key for key in left if key.removesuffix("_hint") in ("temperature", "top_p")}
    assert left - hints == set()


def test_the_page_writes_no_word_of_its_own_in_a_script() -> None:
    for script in SCRIPTS:
        if script.name in ("texts.js", "snippets.js"):
            continue
        shown = re.findall(r'textContent = "([A-Za-z ]{3,})"', script.read_text())
        assert shown == [], script.name
