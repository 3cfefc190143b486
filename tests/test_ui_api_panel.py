"""The API panel: the right key for each visitor, nowhere else a key, and programs that run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from playwright.sync_api import Browser, expect

from tests.browser import Reader, chromium
from tests.page_server import PageServer, start

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

PUBLIC = ["", "config", "gradio_api/info", "gradio_api/openapi.json", "openapi.json", "ui/status"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    running = start(tmp_path_factory.mktemp("page"), settings={"key_display": "guest"})
    yield running
    running.close()


def open_panel(browser: Browser, url: str) -> Reader:
    who = Reader(browser, url, permissions=["clipboard-read", "clipboard-write"])
    who.wait_for_box()
    who.page.click("#open-api")
    return who


@pytest.fixture(scope="module")
def panel(browser: Browser, server: PageServer) -> Iterator[Reader]:
    who = open_panel(browser, server.url)
    yield who
    who.context.close()


def shown_key(who: Reader) -> str:
    who.page.click("#key-show")
    expect(who.page.locator("#key-value")).not_to_contain_text("•")
    return who.page.locator("#key-value").inner_text()


def copied_program(who: Reader, name: str) -> str:
    who.page.click(f"#program-{name}")
    expect(who.page.locator("#program-note")).not_to_have_text("")
    expect(who.page.locator("#program-copy")).to_have_text("Copy")  # of the one before
    who.page.click("#program-copy")
    expect(who.page.locator("#program-copy")).to_have_text("Copied")
    return who.copied()


def test_a_visitor_gets_a_guest_key_that_opens_chat_only(
    browser: Browser, server: PageServer
) -> None:
    who = open_panel(browser, server.url)
    expect(who.page.locator("#key-value")).to_contain_text("•")
    key = shown_key(who)
    assert key.startswith("sk-guest-")
    expect(who.page.locator("#key-note")).to_contain_text("ends in 60 minutes")
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{server.url}v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{server.url}version", headers=headers).status_code == 403
    who.page.click("#key-show")
    expect(who.page.locator("#key-value")).to_contain_text("•")
    who.context.close()


def test_the_owners_link_shows_the_owners_key_and_leaves_no_trace_in_the_address(
    browser: Browser, server: PageServer
) -> None:
    who = open_panel(browser, f"{server.url}#owner={server.keys.owner_token}")
    assert "owner" not in who.page.url
    key = shown_key(who)
    assert server.keys.identify([key]).is_owner
    who.reload()
    who.page.click("#open-api")
    assert shown_key(who) == key
    who.context.close()


def test_no_key_is_in_anything_else_that_the_server_gives(
    browser: Browser, server: PageServer
) -> None:
    who = open_panel(browser, f"{server.url}#owner={server.keys.owner_token}")
    secrets = [shown_key(who), server.keys.owner_token, "sk-guest-"]
    who.ask("hello")
    who.reload()
    seen = {r.url for r in who.requests if r.method == "GET" and r.url.startswith(server.url)}
    endless = ("queue/data", "heartbeat", "/ui/key")
    asked = {url for url in seen if not any(part in url for part in endless)}
    asked |= {server.url + path for path in PUBLIC}
    assert len(asked) > 20
    for url in sorted(asked):
        given = httpx.get(url).text
        assert not [s for s in secrets if s in given], url
    assert httpx.get(server.url + "ui/key").status_code == 403
    who.context.close()


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"app_api_key": "operators-secret"}, "operator", "The key was set by the operator"),
        ({"key_display": "off"}, "off", "The operator shows no key here"),
    ],
)
def test_the_panel_says_why_it_shows_no_key(
    browser: Browser, tmp_path: Path, settings: dict[str, str], kind: str, words: str
) -> None:
    server = start(tmp_path, settings={"host": "0.0.0.0", **settings})
    who = open_panel(browser, server.url)
    who.page.click("#key-show")
    expect(who.page.locator("#key-note")).to_contain_text(words)
    expect(who.page.locator("#key-value")).to_contain_text("•")
    expect(who.page.locator("#program-note")).to_have_text("curl")
    assert "$API_KEY" in copied_program(who, "curl")
    who.context.close()
    server.close()


# ---- each program, run as it was copied ----


def run_shell(program: str, folder: Path) -> str:
    done = subprocess.run(["bash", "-c", program], capture_output=True, timeout=60)
    return done.stdout.decode() + done.stderr.decode()


def run_python(program: str, folder: Path) -> str:
    file = folder / "chat.py"
    file.write_text(program)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, timeout=60)
    return done.stdout.decode() + done.stderr.decode()


def run_node(program: str, folder: Path) -> str:
    file = folder / "chat.mjs"
    file.write_text(program)
    done = subprocess.run([node_path(), str(file)], capture_output=True, timeout=60)
    return done.stdout.decode() + done.stderr.decode()


def node_path() -> str:
    """Node is beside Playwright's driver, which is a Node program."""
    import playwright

    return str(Path(playwright.__file__).parent / "driver" / "node")


def follow_cursor(program: str, folder: Path) -> str:
    """What Cursor does with the three fields."""
    fields = dict(re.findall(r"^  ([\w ]+):\s+(\S+)$", program, re.MULTILINE))
    base, key = fields["Override OpenAI Base URL"], fields["OpenAI API Key"]
    return ask_openai(base, key, fields["Add model"])


def ask_openai(base: str, key: str, model: str) -> str:
    client = OpenAI(base_url=base, api_key=key)
    question = "What is the capital of France?"
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}]
    )
    return answer.choices[0].message.content or ""


def follow_codex(program: str, folder: Path) -> str:
    """What Codex does with its file: the Responses API there, the key from the variable."""
    settings = tomllib.loads(program)
    provider = settings["model_providers"][settings["model_provider"]]
    exported = re.search(r'export (\w+)="([^"]+)"', program)
    assert exported is not None and exported[1] == provider["env_key"]
    assert provider["wire_api"] == "responses"
    client = OpenAI(base_url=provider["base_url"], api_key=exported[2])
    answer = client.responses.create(
        model=settings["model"], input="What is the capital of France?"
    )
    return answer.output_text


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("curl", run_shell),
        ("Python", run_python),
        ("JavaScript", run_node),
        ("gradio_client", run_python),
        ("Cursor", follow_cursor),
        ("Codex", follow_codex),
    ],
)
def test_each_program_runs_as_it_is_copied(
    panel: Reader, tmp_path: Path, name: str, run: Callable[[str, Path], str]
) -> None:
    program = copied_program(panel, name)
    assert "$API_KEY" not in program
    assert "What is the capital of France?" in run(program, tmp_path), program
    assert "sk-guest-" not in panel.page.locator("#program").inner_text()
