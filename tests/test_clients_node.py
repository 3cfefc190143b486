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
from typing import Any

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
AGENTS = ("@openai/agents@0.20.0", *SDK)


def object_of(**properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}  # fmt: skip


# Tools of growing shape, as the public compatibility test for gpt-oss servers has them: no
# arguments, one, several, an enumeration, a nested object, an array, text that needs escapes.
CASES: list[dict[str, object]] = [
    {"tool": "system_health", "parameters": object_of(), "arguments": {}},
    {"tool": "detect_language", "parameters": object_of(text={"type": "string"}),
     "arguments": {"text": "Où est la gare ? 駅はどこ"}},
    {"tool": "convert_currency", "parameters": object_of(
        amount={"type": "number"}, source={"type": "string"}, target={"type": "string"}),
     "arguments": {"amount": 12.5, "source": "EUR", "target": "JPY"}},
    {"tool": "make_chart", "parameters": object_of(
        kind={"type": "string", "enum": ["bar", "line"]},
        values={"type": "array", "items": {"type": "number"}}),
     "arguments": {"kind": "line", "values": [1, 2.5, -3]}},
    {"tool": "search_orders", "parameters": object_of(
        filter=object_of(city={"type": "string"}, open={"type": "boolean"})),
     "arguments": {"filter": {"city": "Zürich", "open": True}}},
    {"tool": "to_html", "parameters": object_of(markdown={"type": "string"}),
     "arguments": {"markdown": '# "Title"\n\\ <b> & {json: [1]}\t\U0001f600'}},
]  # fmt: skip


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
    for case in CASES:
        if f"please call {case['tool']}" in turn:
            if f"result of {case['tool']}" in turn:
                return ids(f"{ANALYSIS}Good.{NEXT}{FINAL}Done with {case['tool']}.<|return|>")
            written = json.dumps(case["arguments"], ensure_ascii=False)
            return ids(call(str(case["tool"]), written))
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


def test_the_agents_sdk_gets_what_the_compatibility_test_for_gpt_oss_asks(
    served: Served, tmp_path: Path
) -> None:
    """Both dialects, streamed and whole: the tool is called with the right arguments, reasoning is
    where clients look for it, and the loop ends with the final answer."""
    folder = installed(*AGENTS)
    shutil.copy(Path(__file__).parent / "node" / "agents.mjs", folder / "agents.mjs")
    cases = [
        {**case, "input": f"please call {case['tool']}", "result": f"result of {case['tool']}"}
        for case in CASES
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        ["node", "agents.mjs", f"{served.base}/v1", OWNER, str(tmp_path / "cases.json")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 4 * len(CASES)
    wanted = {str(case["tool"]): case["arguments"] for case in CASES}
    for run in runs:
        assert [name for name, _ in run["calls"]] == [run["tool"]], run
        assert json.loads(run["calls"][0][1]) == wanted[run["tool"]]
        assert run["final"] == f"Done with {run['tool']}."
        (check_chat if run["dialect"] == "chat" else check_responses)(run)


def check_chat(run: dict[str, Any]) -> None:
    if run["stream"]:
        deltas = [event["choices"][0]["delta"] for event in run["events"] if event["choices"]]
        assert any(delta.get("reasoning") for delta in deltas)
        return
    messages = [answer["choices"][0]["message"] for answer in run["raw"]]
    assert any(message.get("reasoning") for message in messages)
    assert any(message.get("reasoning_content") for message in messages)


def check_responses(run: dict[str, Any]) -> None:
    ended = [e["response"] for e in run["events"] if e["type"] == "response.completed"]
    first = (ended or run["raw"])[0]
    thoughts = [item for item in first["output"] if item["type"] == "reasoning"]
    assert thoughts
    for thought in thoughts:
        assert thought["content"]
        assert all(part["type"] == "reasoning_text" and part["text"] for part in thought["content"])
    if run["stream"]:
        kinds = {event["type"] for event in run["events"]}
        assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= kinds


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
