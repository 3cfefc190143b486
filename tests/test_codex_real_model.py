"""Codex CLI does a two-step task with a real small model behind the real app.

Codex itself always leaves the choice of a tool to the model, and a model of 135M parameters chooses
none. So a forwarding proxy stands between the two and changes three fields of what Codex asks:

- Its first request must call Codex's own `exec_command`, whose schema is narrowed to
  `echo <small letters>`: which word is echoed the model decides, and whatever it decides is
  harmless to run. The name, the JSON and the schema are held by the server's grammar.
- Its later ones may call nothing, so that the model has to answer.

All else is passed on as it comes, both streams with it. How sensible the model's words are is not
judged here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.sources import embedded, registry
from serve.sources.meter import Meter
from tests.conftest import KEY, ROOT, RunningApp, StartApp
from tests.test_clients_node import CODEX, installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.node,
    pytest.mark.real,
    pytest.mark.skipif(
        shutil.which("node") is None or shutil.which("npm") is None,
        reason="node and npm are not installed",
    ),
]
# The model was trained on 8,192 tokens; with all of Codex's tools a prompt may be longer.
CONTEXT = 16_384
ECHO = "echo [a-z]{2,12}"
# A template that has tools, in the manner of the Hermes family; SmolLM2's own has none.
TEMPLATE = """\
{%- if tools -%}
<|im_start|>system
You may call these functions:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Call one by writing a JSON object between tags:
<tool_call>
{"name": the function's name, "arguments": its arguments}
</tool_call><|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == "tool" -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else -%}
<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""


@pytest.fixture
def model_folder(tmp_path: Path) -> Iterator[Path]:
    """The embedded model as a folder of safetensors, with a template that has tools."""
    import torch

    from serve.quantization.gguf import load_gguf

    kept = ROOT / ".test-cache" / "gpt_oss_app_runtime" / "models" / "embedded"
    with Meter(lambda progress: None, embedded.REFERENCE, registry.NAME) as meter:
        weights = embedded.fetch(kept, meter)
    model, tokenizer = load_gguf(weights, torch.bfloat16)
    model.config.max_position_embeddings = CONTEXT
    model.generation_config.do_sample = False
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path / "SmolLM2-with-tools"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


class Proxy(ThreadingHTTPServer):
    """Passes POSTs on to `target`; keeps what was asked, as changed, and what was answered."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Forwarder)
        self.target = target
        self.asked: list[dict[str, Any]] = []
        self.answered: list[bytes] = []


class Forwarder(BaseHTTPRequestHandler):
    server: Proxy

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (forbid_calls if self.server.asked else force_an_echo)(body)
        self.server.asked.append(body)
        headers = {"Authorization": self.headers["Authorization"]}
        url = self.server.target + self.path
        with httpx.stream("POST", url, json=body, headers=headers, timeout=900) as answer:
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            got = bytearray()
            for piece in answer.iter_bytes():
                got += piece
                self.wfile.write(piece)
        self.server.answered.append(bytes(got))

    def log_message(self, format: str, *args: object) -> None:
        pass


def force_an_echo(body: dict[str, Any]) -> None:
    tool = next(tool for tool in body["tools"] if tool.get("name") == "exec_command")
    tool["strict"] = True
    tool["parameters"] = {
        "type": "object",
        "properties": {"cmd": {"type": "string", "pattern": f"^{ECHO}$"}},
        "required": ["cmd"],
        "additionalProperties": False,
    }
    body["tool_choice"] = {"type": "function", "name": "exec_command"}
    body["parallel_tool_calls"] = False


def forbid_calls(body: dict[str, Any]) -> None:
    body["tool_choice"] = "none"


@contextlib.contextmanager
def proxy(app: RunningApp) -> Iterator[Proxy]:
    with Proxy(app.base) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def codex(server: Proxy, models: object, folder: Path, task: str) -> list[dict[str, Any]]:
    """What `codex exec` told of its work, given our model list. Fails with its output when it did
    not end well."""
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    (home / "models.json").write_text(json.dumps({"models": models}))
    base = f"http://127.0.0.1:{server.server_port}/v1"
    provider = (
        f'name="ours",base_url="{base}",env_key="OUR_KEY",wire_api="responses",'
        "request_max_retries=0,stream_max_retries=0,stream_idle_timeout_ms=900000"
    )
    done = subprocess.run(
        [installed(*CODEX) / "node_modules" / ".bin" / "codex", "exec",
         "-c", 'model_provider="ours"', "-c", f"model_providers.ours={{{provider}}}",
         "-c", f'model_catalog_json="{home / "models.json"}"', "-m", "SmolLM2-with-tools",
         "--skip-git-repo-check", "--sandbox", "danger-full-access", "--json", task],
        cwd=work,
        env={**os.environ, "CODEX_HOME": str(home), "OUR_KEY": KEY},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def events(answer: bytes) -> list[dict[str, Any]]:
    lines = answer.decode().splitlines()
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(data) for data in found if data != "[DONE]"]


def test_codex_runs_what_a_real_model_calls_and_ends_with_its_answer(
    model_folder: Path, start_app: StartApp, tmp_path: Path
) -> None:
    app = start_app(MODEL_LOCAL_PATH=str(model_folder))
    app.wait("/ready", 240)
    with app.client() as client:
        models = client.get("/v1/models").json()["models"]
    with proxy(app) as server:
        told = codex(server, models, tmp_path, "Echo a word, then tell me what was printed.")
    assert not [event for event in told if event["type"] in ("error", "turn.failed")], told
    asked, (calling, answering) = server.asked, map(events, server.answered)

    called = next(e for e in calling if e["type"] == "response.function_call_arguments.done")
    command = json.loads(called["arguments"])["cmd"]
    assert re.fullmatch(ECHO, command)
    items = [event["item"] for event in told if event["type"] == "item.completed"]
    ran = [item for item in items if item["type"] == "command_execution"]
    assert len(ran) == 1 and ran[0]["exit_code"] == 0
    word = command.removeprefix("echo ")
    assert ran[0]["aggregated_output"].strip() == word

    assert len(asked) == 2
    results = [item for item in asked[1]["input"] if item["type"] == "function_call_output"]
    assert len(results) == 1 and word in results[0]["output"]

    ended = [stream[-1] for stream in (calling, answering)]
    assert [event["type"] for event in ended] == ["response.completed"] * 2
    used = [event["response"]["usage"] for event in ended]
    assert all(usage["input_tokens"] > 500 for usage in used), used
    deltas = [e["delta"] for e in answering if e["type"] == "response.output_text.delta"]
    assert items[-1]["type"] == "agent_message"
    assert items[-1]["text"] == "".join(deltas) and "".join(deltas).strip()
    assert not [item for item in items if item["type"] == "error"]
