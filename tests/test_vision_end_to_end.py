"""A real vision model, small enough to be committed, asked real questions by every kind of client.

tests/models/tiny_vlm names the colour and shape in a picture and reads numbers; the pictures here
come from seeds it has not seen (scripts/make_tiny_vlm.py trained it on others).
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from serve.engine.face import BlockingMailbox, Ended, GenerationRequest, Tokens
from serve.formats.base import ChatFormat
from serve.values import ChatRequest, ImagePart, Message, Sampling, TextPart
from tests.browser import Reader, chromium
from tests.conftest import KEY, ROOT, RunningApp, StartApp, start
from tests.test_clients_node import SDK, installed
from tests.tiny import tiny_llama
from tests.tiny_pictures import Scene, draw, encoded, fonts, scene
from tests.tiny_talk import ANSWERS, NO_PICTURE, sentence

MODEL = ROOT / "tests" / "models" / "tiny_vlm"
SEE = "What can you see?"
STAR, NUMBER = Scene("red", "star"), Scene("blue", "42")


def picture(shown: Scene, kind: str = "PNG") -> bytes:
    return encoded(draw(shown, random.Random(7)), kind)


def data_url(shown: Scene, kind: str = "PNG") -> str:
    written = base64.b64encode(picture(shown, kind)).decode()
    return f"data:image/{kind.lower()};base64,{written}"


def image(shown: Scene, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(shown), **more}}


def chat(*parts: dict[str, Any] | str, **options: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    messages = [{"role": "user", "content": content}]
    return {"model": "default", "temperature": 0, "messages": messages, **options}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    running = start(tmp_path_factory.mktemp("vision"), MODEL_LOCAL_PATH=str(MODEL))
    try:
        running.wait("/ready", 240)
        yield running
    finally:
        running.stop()


@pytest.fixture
def sdk(app: RunningApp) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{app.base}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models_and_ready_say_that_it_sees(app: RunningApp) -> None:
    with app.client() as client:
        (listed,) = client.get("/v1/models").json()["data"]
        ready = client.get("/ready").json()
    assert listed["capabilities"]["vision"] is True
    assert ready["model"]["capabilities"]["vision"] is True


def test_curl_sends_a_picture_and_is_told_what_is_in_it(app: RunningApp, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    assert curl, "curl is needed for this test: apt-get install curl"
    body = tmp_path / "body.json"
    body.write_text(json.dumps(chat(SEE, image(NUMBER))))
    done = subprocess.run(
        [curl, "-sS", f"{app.base}/v1/chat/completions", "-H", f"Authorization: Bearer {KEY}",
         "-H", "Content-Type: application/json", "-d", f"@{body}"],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == sentence(NUMBER)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_kind_of_file_is_seen(kind: str, sdk: OpenAI) -> None:
    shown = {"type": "image_url", "image_url": {"url": data_url(STAR, kind)}}
    answer = sdk.chat.completions.create(**chat(shown, SEE))
    assert answer.choices[0].message.content == sentence(STAR)
    assert answer.usage is not None and answer.usage.prompt_tokens > 64


def test_a_stream_says_the_same_as_the_whole_answer(sdk: OpenAI) -> None:
    body = chat(image(STAR), SEE)
    whole = sdk.chat.completions.create(**body).choices[0].message.content
    chunks = list(sdk.chat.completions.create(**body, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole


def test_several_pictures_are_told_apart(sdk: OpenAI) -> None:
    answer = sdk.chat.completions.create(**chat(image(STAR), image(NUMBER), SEE))
    told = f"First: {sentence(STAR)} Second: {sentence(NUMBER)}"
    assert answer.choices[0].message.content == told


def test_a_conversation_goes_on_about_its_picture_from_the_cache(sdk: OpenAI) -> None:
    body = chat(image(STAR), SEE)
    first = sdk.chat.completions.create(**body).choices[0].message.content
    body["messages"] += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "What colour is it?"},
    ]
    answer = sdk.chat.completions.create(**body)
    assert answer.choices[0].message.content == "Red."
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 64


def test_responses_takes_input_images_with_detail(sdk: OpenAI) -> None:
    answer = sdk.responses.create(
        model="default",
        temperature=0,
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": SEE},
                    {"type": "input_image", "image_url": data_url(NUMBER), "detail": "low"},
                ],
            }
        ],
    )
    assert answer.output_text == sentence(NUMBER)


def test_without_a_picture_it_says_so(sdk: OpenAI) -> None:
    answer = sdk.chat.completions.create(**chat(SEE))
    assert answer.choices[0].message.content == NO_PICTURE


def test_pictures_and_text_run_together_and_each_gets_its_own_answer(app: RunningApp) -> None:
    shown = [scene(random.Random(seed)) for seed in range(40, 52)]
    bodies = [chat(image(one), SEE) for one in shown]
    bodies[3::4] = [chat(SEE)] * len(bodies[3::4])

    def ask(body: dict[str, Any]) -> str:
        with app.client() as client:
            answer = client.post("/v1/chat/completions", json=body)
            return str(answer.json()["choices"][0]["message"]["content"])

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(ask, bodies))
    assert together == alone
    assert together[3::4] == [NO_PICTURE] * 3


@pytest.mark.node
@pytest.mark.skipif(shutil.which("npm") is None, reason="node and npm are not installed")
def test_the_node_sdk_is_told_what_is_in_a_picture(app: RunningApp) -> None:
    script = """
    import OpenAI from "openai";
    const [base, key, url] = process.argv.slice(2);
    const client = new OpenAI({ baseURL: base + "/v1", apiKey: key, maxRetries: 0 });
    const answer = await client.chat.completions.create({ model: "default", temperature: 0,
      messages: [{ role: "user", content: [{ type: "text", text: "What can you see?" },
        { type: "image_url", image_url: { url } }] }] });
    const response = await client.responses.create({ model: "default", temperature: 0,
      input: [{ role: "user", content: [{ type: "input_text", text: "What can you see?" },
        { type: "input_image", image_url: url }] }] });
    console.log(JSON.stringify([answer.choices[0].message.content, response.output_text]));
    """
    folder = installed(*SDK)
    (folder / "picture.mjs").write_text(script)
    done = subprocess.run(
        ["node", "picture.mjs", app.base, KEY, data_url(STAR)],
        cwd=folder, capture_output=True, timeout=120, check=False, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [sentence(STAR)] * 2


def test_gradio_client_sends_a_file(app: RunningApp, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    path = tmp_path / "star.png"
    path.write_bytes(picture(STAR))
    client = Client(app.base, verbose=False)
    try:
        answer = client.predict(
            {"text": SEE, "files": [handle_file(path)]}, temperature=0, api_name="/chat"
        )
    finally:
        client.close()
    assert answer == sentence(STAR)


@pytest.mark.browser
def test_the_page_takes_a_picture_and_says_what_is_in_it(app: RunningApp, tmp_path: Path) -> None:
    path = tmp_path / "number.png"
    path.write_bytes(picture(NUMBER))
    with chromium() as browser, Reader(browser, app.base) as reader:
        badge = reader.page.get_by_text("sees images")
        badge.first.wait_for(timeout=20_000)
        reader.page.set_input_files("#composer input[type=file]", str(path))
        reader.page.wait_for_function(
            "() => document.querySelector('#composer').innerText.includes('number')"
            " || document.querySelector('#composer img')"
        )
        reader.page.wait_for_timeout(500)
        answer = reader.ask("Read the digits. What colour is it?")
        assert not reader.errors
    assert "42" in answer or "Blue" in answer


# ---- pictures that cannot be ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG, JPEG, WebP or GIF"),
        (picture(STAR)[:300], "damaged or cut short"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0" + b"\0" * 20, "megapixels"),
    ],
    ids=["svg", "truncated", "bomb"],
)
def test_a_bad_picture_is_a_400_that_names_its_part_and_costs_no_worker(
    app: RunningApp, data: bytes, said: str
) -> None:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    body = chat(SEE, {"type": "image_url", "image_url": {"url": url}})
    with app.client() as client:
        for stream in (False, True):
            answer = client.post("/v1/chat/completions", json={**body, "stream": stream})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (
                400,
                "messages[0].content[1].image_url.url",
            )
            assert said in error["message"]
        good = client.post("/v1/chat/completions", json=chat(image(STAR), SEE))
    assert good.json()["choices"][0]["message"]["content"] == sentence(STAR)


def test_an_address_is_not_fetched_unless_the_setting_says_so(app: RunningApp) -> None:
    body = chat(SEE, {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})
    with app.client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "ALLOW_IMAGE_URLS" in answer.json()["error"]["message"]


def test_a_model_that_only_reads_refuses_or_answers_from_the_text_and_says_so(
    start_app: StartApp, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "reads")
    strict = start_app(MODEL_LOCAL_PATH=str(folder))
    lenient = start_app(MODEL_LOCAL_PATH=str(folder), IMAGE_FALLBACK="drop")
    body = chat(SEE, image(STAR), max_tokens=4)
    for app in (strict, lenient):
        ready = app.wait("/ready", 240).json()
        assert ready["model"]["capabilities"]["vision"] is False
    with strict.client() as client:
        refused = client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages[0].content[1].image_url.url"
    with lenient.client() as client:
        answered = client.post("/v1/chat/completions", json=body)
    assert answered.status_code == 200
    assert answered.headers["x-images-not-used"] == "1"
    with lenient.client() as client:
        plain = client.post("/v1/chat/completions", json=chat(SEE, max_tokens=4))
    assert "x-images-not-used" not in plain.headers


# ---- how well it sees ----------------------------------------------------------------------------


def test_it_is_right_about_more_than_95_of_100_pictures_it_has_not_seen() -> None:
    """Through the format and the engine, a batch at a time."""
    spoken, engine = loaded()
    faces = fonts(Path("/usr/share/fonts"))
    try:
        right: dict[str, list[bool]] = {}
        waiting = []
        for seed in range(300_000, 300_200):
            chance = random.Random(seed)
            shown = scene(chance)
            asked = tuple(ANSWERS)[seed % len(ANSWERS)]
            data = encoded(draw(shown, chance, faces))
            request = ChatRequest(
                (Message("user", (ImagePart(data), TextPart(asked))),),
                Sampling(temperature=0.0, max_tokens=24),
            )
            mailbox = BlockingMailbox()
            rendered = spoken.render(request)
            engine.submit(GenerationRequest(rendered.prompt, request.sampling), mailbox)
            waiting.append((mailbox, asked, ANSWERS[asked](shown), request))
        for mailbox, asked, answer, request in waiting:
            right.setdefault(asked, []).append(said(mailbox, spoken, request) == answer)
    finally:
        engine.close()
    share = {asked: sum(marks) / len(marks) for asked, marks in right.items()}
    assert sum(map(sum, right.values())) > 0.95 * len(waiting), share


def loaded() -> tuple[ChatFormat, Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    from serve.engine.config import EngineConfig
    from serve.engine.seeing import create_seeing_engine
    from serve.formats.choose import choose
    from serve.quantization.processor import load_processor

    processor = load_processor(MODEL)
    assert processor is not None
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    ends = frozenset({int(model.generation_config.eos_token_id)})
    engine = create_seeing_engine(
        model,
        eos_ids=ends,
        context_length=1024,
        device=torch.device("cpu"),
        config=EngineConfig(kv_cache_gb=0.1, threads=2),
    )
    return choose(processor.tokenizer, "llava", ends, processor=processor), engine


def said(mailbox: BlockingMailbox, spoken: ChatFormat, request: ChatRequest) -> str:
    parser = spoken.parser(request)
    events = []
    for message in mailbox:
        if isinstance(message, Tokens):
            events += parser.feed(message.ids)
        assert not isinstance(message, Ended) or message.outcome == "finished", message
    return "".join(event.text for event in [*events, *parser.finish()])  # type: ignore[union-attr]
