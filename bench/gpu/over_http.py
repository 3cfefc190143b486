"""The engine's rate and the same engine's rate over HTTP with streaming, in one process and run.

    python bench/gpu/over_http.py [--paced] [--streams 64] [--profile FILE]

The app's own routes, Harmony format and engine serve made gpt-oss weights; a client in a process
of its own reads every stream. `--paced` needs no GPU: steps take the time they took on an H100 and
draw random ids, so that what the host adds shows (and, with --profile, where).
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from serve.engine.cache import GroupSpec, KVCache
from serve.engine.config import EngineConfig
from serve.engine.engine import PagedEngine
from serve.engine.face import BlockingMailbox, Ended, Engine, GenerationRequest, Prompt
from serve.engine.runner import Launched
from serve.engine.sampling import Draw
from serve.engine.scheduler import Chunk
from serve.formats.choose import choose
from serve.service import ServedModel, Service
from serve.values import ModelCard, Sampling

VOCABULARY = 201_088
TOKENS = 256
STEP_MS = {1: 2.39, 8: 4.64, 32: 6.12, 64: 6.41, 128: 7.47, 256: 10.3}
PROMPT_MS = 1000 / 45_000  # a prompt token


class Paced:
    """A runner whose steps take a GPU's time and nothing of the host's."""

    vocabulary = VOCABULARY

    def __init__(self) -> None:
        self._free_at = 0.0
        self._due: dict[int, float] = {}
        self._number = 0

    def prepare(self, threads: int | None) -> None: ...

    def free_memory(self) -> None: ...

    def beside(self, work: Callable[[], None]) -> bool:
        return False

    def launch(self, chunks: Sequence[Chunk], after: Launched | None) -> Launched | None:
        if any(chunk.count > 1 for chunk in chunks):
            return None
        self._number += 1
        self._due[self._number] = self._end(chunks)
        return Launched(chunks, self._number)

    def take(self, launched: Launched) -> list[Draw]:
        return self._wait(self._due.pop(launched.place), len(launched.chunks))

    def run(self, chunks: Sequence[Chunk]) -> list[Draw]:
        return self._wait(self._end(chunks), sum(chunk.draws for chunk in chunks))

    def _end(self, chunks: Sequence[Chunk]) -> float:
        size = next(ms for size, ms in STEP_MS.items() if size >= len(chunks))
        prompts = sum(chunk.count for chunk in chunks if chunk.count > 1)
        begin = max(time.monotonic(), self._free_at)
        self._free_at = begin + (size + prompts * PROMPT_MS) / 1000
        return self._free_at

    def _wait(self, until: float, rows: int) -> list[Draw]:
        time.sleep(max(0.0, until - time.monotonic()))
        return [Draw(random.randrange(199_000)) for _ in range(rows)]


def paced_engine(config: EngineConfig) -> PagedEngine:
    groups = (GroupSpec(None, (0,), 20_000), GroupSpec(128, (1,), 20_000))
    runner: Any = Paced()
    return PagedEngine(
        runner, KVCache(groups, config.block_size, 8193), config,
        eos_ids=frozenset({200_002}), context_length=8192, vocabulary=VOCABULARY,
    ).start()  # fmt: skip


def text(number: int) -> str:
    """A question of about 60 tokens; the system's own part makes it about 130."""
    draw = random.Random(number)
    words = ("river", "bread", "clock", "bee", "tide", "glass", "map", "salt", "wool", "star")
    return f"Question {number}: " + " ".join(draw.choice(words) for _ in range(54))


def engine_rate(engine: Engine, streams: int, prompt: int) -> float:
    """Output tokens a second from the first submit to the last end."""
    sampling = Sampling(temperature=1.0, max_tokens=TOKENS, ignore_eos=True)
    draws = [[random.randrange(3, 199_000) for _ in range(prompt)] for _ in range(streams)]
    boxes = [BlockingMailbox() for _ in draws]
    began = time.perf_counter()
    for ids, box in zip(draws, boxes, strict=True):
        engine.submit(GenerationRequest(Prompt(tuple(ids)), sampling), box)
    ends = [message for box in boxes for message in box if isinstance(message, Ended)]
    return sum(end.completion_tokens for end in ends) / (time.perf_counter() - began)


def measure(engine: Engine, streams: int, rounds: int = 3) -> None:
    """Prints both rates, `rounds` times."""
    from tests.o200k import harmony_tokenizer
    from tests.serving import serving, settings_in

    format_ = choose(harmony_tokenizer(), eos_ids=frozenset({200_002}), vocabulary_size=VOCABULARY)
    service = Service("gpt-oss:20b")
    service.attach(ServedModel(ModelCard("gpt-oss:20b", engine.context_length), format_, engine))
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(service, settings_in(Path(folder))) as served,
    ):
        format_.warm()  # as app.py does before it takes requests
        load = [sys.executable, __file__, "--client", served.base.rpartition(":")[2]]
        for number in range(rounds):
            before = time.process_time()
            alone = engine_rate(engine, streams, 130)
            between = time.process_time()
            first = str(random.randrange(10**6))
            command = [*load, "--streams", str(streams), "--first", first]
            told = json.loads(
                subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout
            )
            spent = (between - before, time.process_time() - between)
            over = told["tokens"] / told["seconds"]
            print(
                f"round {number}: engine {streams} streams {alone:8.0f} tok/s, over HTTP "
                f"{over:8.0f} = {100 * over / alone:.1f} %, "
                f"{told['tokens'] / told['frames']:.2f} "
                f"tokens a frame, first after {told['first'] * 1000:.0f} ms; processor time "
                f"{spent[0] / told['tokens'] * 1e6:.0f} and "
                f"{spent[1] / told['tokens'] * 1e6:.0f} us a token",
                flush=True,
            )


async def client(port: int, streams: int, first: int) -> None:
    """All streams at once; prints tokens, seconds from the first byte sent to the last end, frames
    and the median time to the first text."""
    from tests.serving import OWNER

    began = time.perf_counter()
    found = await asyncio.gather(*(ask(port, OWNER, text(first + i)) for i in range(streams)))
    seconds = time.perf_counter() - began
    tokens, frames = (sum(answer[i] for answer in found) for i in (0, 1))
    firsts = sorted(answer[2] for answer in found)
    told = {
        "tokens": tokens,
        "frames": frames,
        "seconds": seconds,
        "first": firsts[len(firsts) // 2],
    }
    print(json.dumps(told))


async def ask(port: int, key: str, question: str) -> tuple[int, int, float]:
    body = json.dumps(
        {
            "model": "gpt-oss:20b", "stream": True, "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS,
            "temperature": 1, "ignore_eos": True,
        }
    ).encode()  # fmt: skip
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    began, frames, first, tokens = time.perf_counter(), 0, 0.0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + body)
    async for line in reader:
        if b'"delta":{"content":"' in line and b'"content":""' not in line:
            frames += 1
            first = first or time.perf_counter() - began
        elif b'"completion_tokens":' in line:
            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    if not tokens:
        raise SystemExit("a stream ended without its usage")
    return tokens, frames, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paced", action="store_true")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--waits", action="store_true", help="no step ahead")
    parser.add_argument("--profile", help="write the serving thread's cProfile here")
    parser.add_argument("--client", type=int, help="(for itself) the port to ask")
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    if options.client:
        asyncio.run(client(options.client, options.streams, options.first))
        return
    config = EngineConfig(max_running=128, prefill_chunk=2048, runs_ahead=not options.waits)
    if options.profile:
        profile_loops(options.profile)
    measure(paced_engine(config) if options.paced else made_engine(config), options.streams)


def made_engine(config: EngineConfig) -> PagedEngine:
    import torch

    from bench.gpu import made
    from serve.engine.engine import create_engine

    device = torch.device("cuda")
    return create_engine(
        made.model(device), eos_ids=[200_002], context_length=8192, device=device, config=config
    )


def profile_loops(file: str) -> None:
    """Record the thread that uvicorn runs on."""
    import uvicorn

    real = uvicorn.Server.run

    def run(self: Any, *args: Any, **options: Any) -> None:
        recorder = cProfile.Profile()
        recorder.enable()
        try:
            real(self, *args, **options)
        finally:
            recorder.disable()
            recorder.dump_stats(file)

    uvicorn.Server.run = run  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
