"""Clients in Node against a running server: the official SDK, and Codex CLI at a two-step task.

They run where node and npm are; the packages are installed once, into .test-cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.engine.face import GenerationRequest
from serve.engine.scripted import ScriptedEngine
from serve.service import ServedModel, Service
from serve.values import ModelCard
from tests.conftest import ROOT
from tests.serving import OWNER, Served, serving, settings_in
from tests.test_api_complaints import ANALYSIS, FINAL, NEXT, harmony, ids, text_of

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(
        shutil.which("node") is None or shutil.which("npm") is None,
        reason="node and npm are not installed",
    ),
]
MODEL = "openai/gpt-oss-20b"
SDK = ("openai@7.57.0", "zod@4.1.12")
CODEX = ("@openai/codex@0.169.0",)


def installed(*packages: str) -> Path:
    """A folder whose node_modules holds `packages`; npm is asked once."""
    name = "-".join(package.strip("@").replace("/", "-") for package in packages)
    folder = ROOT / ".test-cache" / "node" / name
    done = folder / "installed"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", *packages]
        subprocess.run(command, cwd=folder, check=True, timeout=600, capture_output=True)
        done.touch()
    return folder


def call(name: str, arguments: str) -> str:
    header = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
    return f"{ANALYSIS}I use it.{NEXT}{header}{arguments}<|call|>"


def script(request: GenerationRequest) -> list[int]:
    """What a model would say: a tool call first, then an answer that needs the tool's result."""
    turn = text_of(request.prompt.ids).rpartition("<|start|>user")[2]
    if "sunny in Paris" in turn:
        return ids(f"{FINAL}It is sunny in Paris.<|return|>")
    if "result-42" in turn:
        return ids(f"{ANALYSIS}Done.{NEXT}{FINAL}The command printed result-42.<|return|>")
    if "json" in turn:
        return ids(f'{FINAL}{{"city":"Paris"}}<|return|>')
    if "use the shell" in turn:
        return ids(call("exec_command", '{"cmd": "echo result-$((40+2))"}'))
    if "tool" in turn:
        return ids(call("get_weather", '{"city": "Paris"}'))
    return ids(f"{ANALYSIS}A greeting.{NEXT}{FINAL}Hello there.<|return|>")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = ScriptedEngine(script, eos_ids=ids("<|return|>"), context_length=131_072)
    service = Service(MODEL)
    card = ModelCard(MODEL, engine.context_length, harmony().capabilities())
    service.attach(ServedModel(card, harmony(), engine))
    with serving(service, settings_in(tmp_path_factory.mktemp("node"))) as served:
        yield served


def test_the_node_sdk_chats_streams_calls_tools_parses_and_responds(served: Served) -> None:
    folder = installed(*SDK)
    shutil.copy(Path(__file__).parent / "node" / "sdk.mjs", folder / "sdk.mjs")
    done = subprocess.run(
        ["node", "sdk.mjs", f"{served.base}/v1", OWNER],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for name in ("chat", "stream", "response", "again", "streamed"):
        assert found[name] == "Hello there.", name
    assert found["deltas"] >= 1 and found["total"] > 10
    assert found["tools"] == "It is sunny in Paris."
    assert found["parsed"] == found["typed"] == {"city": "Paris"}
    assert found["events"][0] == "response.created"
    assert found["events"][-1] == "response.completed"
    assert found["error"] == [404, "model_not_found", "NotFoundError"]
    assert found["models"] == [MODEL]


@pytest.mark.parametrize("reads_our_list", [False, True])
def test_codex_completes_a_two_step_task(
    served: Served, tmp_path: Path, reads_our_list: bool
) -> None:
    """Its second step needs the first one's output. With our model list it takes every field."""
    codex = installed(*CODEX) / "node_modules" / ".bin" / "codex"
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    provider = f'name="ours",base_url="{served.base}/v1",env_key="OUR_KEY",wire_api="responses"'
    options = ["-c", 'model_provider="ours"', "-c", f"model_providers.ours={{{provider}}}"]
    if reads_our_list:
        with served.client() as client:
            models = client.get("/v1/models").json()["models"]
        (home / "models.json").write_text(json.dumps({"models": models}))
        options += ["-c", f'model_catalog_json="{home / "models.json"}"']
    done = subprocess.run(
        [codex, "exec", *options, "-m", MODEL, "--skip-git-repo-check", "--sandbox",
         "danger-full-access", "--json", "use the shell"],
        cwd=work,
        env={**os.environ, "CODEX_HOME": str(home), "OUR_KEY": OWNER},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout + done.stderr
    items = [event["item"] for event in told if event["type"] == "item.completed"]
    ran = [item for item in items if item["type"] == "command_execution"]
    assert len(ran) == 1 and ran[0]["exit_code"] == 0
    assert ran[0]["aggregated_output"].strip() == "result-42"
    assert items[-1]["text"] == "The command printed result-42."
    assert not [event for event in told if event["type"] in ("error", "turn.failed")]
    complaints = [item for item in items if item["type"] == "error"]
    assert bool(complaints) != reads_our_list, complaints


def test_the_model_list_is_what_codex_and_openai_clients_read(served: Served) -> None:
    answer = httpx.get(f"{served.base}/v1/models", headers={"x-api-key": OWNER}).json()
    assert answer["object"] == "list" and answer["data"][0]["id"] == MODEL
    assert answer["models"][0]["slug"] == MODEL
