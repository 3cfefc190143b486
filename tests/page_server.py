"""The page over a scripted engine, on a free port: for the browser tests, and to look at.

python -m tests.page_server            serves until stopped; a message's first word is its script
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from openai_compat import create_api
from serve.engine.face import GenerationRequest, Waiting
from serve.engine.scripted import HANG, Say, ScriptedEngine, Step
from serve.errors import EngineFailed, OutOfMemory
from serve.keys import KeyRing
from serve.limits import Budgets
from serve.service import ServedModel, Service
from serve.settings import Settings
from serve.ui.page import create_page, launch_options
from serve.ui.visit import Visit, VisitOf
from serve.values import Capabilities, ModelCard, Progress
from tests.text_format import BETWEEN, CALL, END, SAY, THINK, TextFormat, encoded

ANSWERS = {
    "slow": "word " * 200,
    "code": "Here:\n\n```python\ndef f(x):\n\treturn x * 2  # tab\n```\n\nand `inline __init__`.",
    "maths": r"Inline \(a^2+b^2=c^2\), $x^2$, display:"
    "\n\n"
    r"\[\int_0^1 x\,dx\]"
    "\n\n$$E=mc^2$$\n\n"
    r"\begin{align}a&=b\\c&=d\end{align}"
    "\n\nIt costs $5 and $10. `\\(code\\)`",
    "exact": "call __init__ and 2*3*4, <div>tag</div>, $5 and $10, a  b, "
    "中文😀, **bold**, ~5, a_b_c",
    "table": "| a | b |\n|---|---|\n| 1 | **2** |\n\n1. one\n2. two\n\n> quote\n\n"
    "[link](https://example.org) ![p](http://x.test/p.png) [bad](javascript:alert(1))",
    "wide": "| n | a | b | c | d |\n|---|---|---|---|---|\n| 1 000 000 % |"
    + " a few words in it |" * 4,
    "listed": "1. Steps:\n\n   ```python\n   def f(x):\n   \treturn x\t# tab\n   ```\n\n"
    "- `a\tb`\n\t- deeper\n\n\t  ```\n\t  \tdeep\n\t  ```\n",
    "hello": "Hello! How can I help?",
}


def script(request: GenerationRequest) -> Iterator[Step]:
    """Plays what the question's first word names; see ANSWERS for texts."""
    question = bytes(request.prompt.ids).decode().rsplit(BETWEEN, 1)[-1]
    word = question.split(" ", 1)[0].lower()
    yield 0.02
    yield from SCENES.get(word, scene_say)(question)
    yield END


def scene_say(question: str) -> Iterator[Step]:
    word = question.split(" ", 1)[0].lower()
    text = ANSWERS.get(word, "You said: " + question)
    pause = 0.01 if word == "slow" else 0.001
    data = encoded(text)
    for i in range(0, len(data), 5):
        yield Say(data[i : i + 5])
        yield pause


def scene_think(question: str) -> Iterator[Step]:
    yield THINK
    for piece in ("First, ", "let me ", "think. ") * 8:
        yield Say(encoded(piece))
        yield 0.1
    yield SAY
    yield Say(encoded("The answer is **42**."))


def scene_tool(question: str) -> Iterator[Step]:
    yield CALL
    yield Say(encoded('get_weather({"city": "Paris", "days": 2}'))


def scene_queue(question: str) -> Iterator[Step]:
    yield Waiting(2, 15.0)
    yield 1.5
    yield Waiting(1, 5.0)
    yield 1.0
    yield Waiting(0)
    yield Say(encoded("Your turn."))


def scene_middle(question: str) -> Iterator[Step]:
    yield Say(encoded("This begins well, but"))
    yield 0.3
    yield EngineFailed("The model's step failed for this request.")


def scene_memory(question: str) -> Iterator[Step]:
    yield OutOfMemory("This request needs 3.1 GB beside the others; 1.2 GB are free.")


def scene_begin(question: str) -> Iterator[Step]:
    yield EngineFailed("The model's step failed for this request.")


def scene_hang(question: str) -> Iterator[Step]:
    yield Say(encoded("And then "))
    yield HANG


SCENES: dict[str, Any] = {
    "think": scene_think,
    "tool": scene_tool,
    "queue": scene_queue,
    "middle": scene_middle,
    "memory": scene_memory,
    "begin": scene_begin,
    "hang": scene_hang,
}


@dataclass
class PageServer:
    url: str
    port: int
    service: Service
    engine: ScriptedEngine
    blocks: Any
    keys: KeyRing
    loop: asyncio.AbstractEventLoop | None

    def close(self) -> None:
        self.service.close()
        self.engine.close()
        self.blocks.close(verbose=False)
        if self.loop is not None:
            asyncio.set_event_loop(None)
            self.loop.close()
        with untidy():
            pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def attach(
    service: Service,
    engine: ScriptedEngine,
    vision: bool | None = False,
    name: str = "scripted/demo",
) -> None:
    fmt = TextFormat()
    card = ModelCard(
        name, engine.context_length, Capabilities(vision, True, True, ("low", "medium", "high"))
    )
    service.attach(ServedModel(card, fmt, engine))


def offer(server: PageServer, models: dict[str, bool | None], seconds: float = 0.5) -> None:
    """Several models, by what they see, to be switched between as app.py's loading thread does; a
    switch takes `seconds`. A name that ends in "broken" cannot be loaded."""
    service = server.service
    service.offer(tuple(models), tuple(name for name, sees in models.items() if sees))

    def load() -> None:
        while (wanted := service.wait_for_switch()) is not None:
            service.detach()
            service.report(Progress("loading", wanted))
            time.sleep(seconds)
            if wanted.endswith("broken"):
                service.fail("No candidate fits this machine.")
            else:
                name = wanted or next(iter(models))
                attach(service, server.engine, models[name], name)

    threading.Thread(target=load, name="page-server-loader", daemon=True).start()


@contextlib.contextmanager
def untidy() -> Iterator[None]:
    """Gradio and its client leave event loops unclosed: collected here, where that is no error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@untidy()
def start(
    work_dir: Path,
    *,
    port: int | None = None,
    is_ready: bool = True,
    vision: bool | None = False,
    capacity: int | None = None,
    settings: dict[str, Any] | None = None,
) -> PageServer:
    """The page and the API over one service, as app.py puts them together."""
    loop = own_loop()
    chosen = Settings(work_dir=work_dir, **{"host": "127.0.0.1", **(settings or {})})
    service = Service("scripted/demo")
    keys = KeyRing.from_settings(chosen)
    budgets = Budgets(chosen)
    api = create_api(service, keys, chosen, budgets)
    engine = ScriptedEngine(script, eos_ids={END}, context_length=20000, capacity=capacity)
    if is_ready:
        attach(service, engine, vision)
    blocks = create_page(service, visit_of=visits(keys, budgets, chosen))
    options = launch_options(service)
    skin, dressing = options["middleware"]
    port = port or free_port()
    blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        app_kwargs={**api, "middleware": [*api["middleware"], Middleware(skin, **dressing)]},
        **options["launch"],
    )
    return PageServer(f"http://127.0.0.1:{port}/", port, service, engine, blocks, keys, loop)


def own_loop() -> asyncio.AbstractEventLoop | None:
    """Gradio's launch wants an event loop in its thread and would leave its own unclosed."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        return loop
    return None


def visits(keys: KeyRing, budgets: Budgets, settings: Settings) -> VisitOf:
    """The page's visitors as app.py knows them."""

    def visit_of(address: str, session: str) -> Visit:
        who = keys.page_identity(address, session)
        return Visit(who.tenant, settings.model_switch == "all", lambda: budgets.admit(who.bucket))

    return visit_of


if __name__ == "__main__":
    import sys

    folder = Path(tempfile.mkdtemp())
    server = start(folder, port=int(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(server.url, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
