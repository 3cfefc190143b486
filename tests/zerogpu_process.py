"""Run by test_engine_zerogpu.py in a process of its own: the real `spaces` package on an emulated
ZeroGPU, our per-request engine over a scripted one. Prints one JSON line a case.

argv: the case. The scheduler's address is in SPACES_ZERO_DEVICE_API_URL.
"""

from __future__ import annotations

import json
import sys
import threading
from types import SimpleNamespace
from typing import Any

sys.modules["torch"] = None  # type: ignore[assignment]  # spaces falls back to its no-op hooks

import spaces  # noqa: E402
import spaces.zero.client as client  # noqa: E402
from gradio.context import LocalContext  # noqa: E402

from serve.engine.face import BlockingMailbox, Ended, GenerationRequest, Prompt, Tokens  # noqa: E402
from serve.engine.scripted import HANG, ScriptedEngine  # noqa: E402
from serve.engine.zerogpu import PerRequestEngine, duration, worker_task  # noqa: E402
from serve.errors import EngineFailed  # noqa: E402
from serve.values import Sampling  # noqa: E402
from tests.fake_zerogpu import TOKEN  # noqa: E402

SCRIPTS: dict[str, list[Any]] = {
    "fails": [5, EngineFailed("it broke")],
    "hangs": [5, HANG],
}


def main() -> None:
    case = sys.argv[1]
    client.utils.self_cgroup_device_path = lambda: "/"
    task = spaces.GPU(worker_task(lambda: ScriptedEngine(SCRIPTS[case])), duration=duration)
    engine = PerRequestEngine(task, vocabulary=1000, context_length=100)
    headers = SimpleNamespace(headers=_Headers({"x-ip-token": TOKEN}))
    LocalContext.request.set(headers)  # type: ignore[arg-type]
    mailbox = BlockingMailbox()
    number = engine.submit(GenerationRequest(Prompt((1, 2, 3)), Sampling(max_tokens=60)), mailbox)
    if case == "hangs":
        threading.Timer(1.0, engine.cancel, (number,)).start()
    report(list(mailbox))
    engine.close(1.0)


class _Headers(dict[str, str]):
    """Has a __dict__, as a request's headers do."""


def report(messages: list[Any]) -> None:
    ended = messages[-1]
    assert isinstance(ended, Ended) and not any(isinstance(m, Ended) for m in messages[:-1])
    error = ended.error
    line = {
        "ids": [i for m in messages if isinstance(m, Tokens) for i in m.ids],
        "outcome": ended.outcome,
        "error": type(error).__name__ if error else None,
        "said": str(error or ""),
    }
    print("CASE " + json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
