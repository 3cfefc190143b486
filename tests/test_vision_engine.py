"""Models that see, in the engine: the same ids as transformers' own generate, family by family, in
one batch with text and with each other, however the prompts are cut."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from serve.engine.attention import Layout
from serve.engine.cache import KVCache
from serve.engine.config import EngineConfig
from serve.engine.engine import PagedEngine
from serve.engine.face import BlockingMailbox, Ended, GenerationRequest, Prompt, Tokens
from serve.engine.seeing import create_seeing_engine, misfit, with_room
from serve.engine.solo import SoloRunner
from serve.engine.vision import FeatureCache, Features, Vision, separate
from serve.values import ChatRequest, ImagePart, Message, Sampling, TextPart
from tests.seeing import (
    ANSWER,
    ASKED,
    Seeing,
    answered,
    conversations,
    part,
    request,
    submitted,
)
from tests.tiny_vision import FAMILIES


def engine_of(seeing: Seeing, **config: Any) -> PagedEngine:
    model = seeing.fresh_model()
    return create_seeing_engine(
        model,
        eos_ids={int(model.generation_config.eos_token_id)},
        context_length=512,
        device=torch.device("cpu"),
        config=EngineConfig(kv_cache_gb=0.02, threads=1, **config),
    )


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda name: name.replace(" ", ""))
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return Seeing(tmp_path_factory.mktemp("seeing"), FAMILIES[request.param])


@pytest.mark.parametrize("chunk", [7, 64, 1024])
def test_answers_are_those_of_generate_in_one_batch_however_prompts_are_cut(
    seeing: Seeing, chunk: int
) -> None:
    asked = conversations()
    expected = [seeing.expected(one) for one in asked]
    assert len(set(map(tuple, expected))) > 1, "this random model says the same to everything"
    engine = engine_of(seeing, prefill_chunk=chunk, block_size=8)
    try:
        boxes = [submitted(engine, seeing.format, one) for one in asked]
        assert [answered(box)[0] for box in boxes] == expected
    finally:
        engine.close()


def test_only_a_class_whose_pictures_see_both_ways_runs_alone_and_the_log_says_so(
    seeing: Seeing, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(seeing)
    engine.close()
    is_alone = "one request at a time" in caplog.text
    assert is_alone == ("Gemma3" in type(seeing.model).__name__) == bool(misfit(seeing.model))
    assert isinstance(engine._runner, SoloRunner) == is_alone


# ---- one family is enough for the rest ----------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return Seeing(tmp_path_factory.mktemp("qwen"), FAMILIES["Qwen3-VL"])


@pytest.fixture
def engine(qwen: Seeing) -> Iterator[PagedEngine]:
    made = engine_of(qwen, block_size=8, prefill_chunk=16)
    yield made
    made.close()


def vision_of(engine: PagedEngine) -> Vision:
    found = engine._runner._inputs
    assert isinstance(found, Vision)
    return found


def test_a_picture_is_encoded_once_for_a_tenant_and_not_shared_between_tenants(
    qwen: Seeing, engine: PagedEngine
) -> None:
    cache = vision_of(engine).cache
    for text in ASKED:
        answered(submitted(engine, qwen.format, request(0, text=text), "anna"))
    assert cache.misses == 1
    later = submitted(engine, qwen.format, request(0, 1), "anna")
    answered(later)
    answered(submitted(engine, qwen.format, request(1, 0), "anna"))
    assert cache.misses == 2
    answered(submitted(engine, qwen.format, request(0), "bert"))
    assert cache.misses == 3


def test_the_same_words_about_another_picture_share_no_blocks(
    qwen: Seeing, engine: PagedEngine
) -> None:
    first, again = (answered(submitted(engine, qwen.format, request(0))) for _ in range(2))
    square = ChatRequest(
        (Message("user", (part(0), TextPart(ASKED[0]))),),
        Sampling(temperature=0.0, max_tokens=ANSWER),
    )
    picture = Image.open(io.BytesIO(part(1).data)).resize((150, 90))
    out = io.BytesIO()
    picture.save(out, "PNG")
    other = ChatRequest(
        (Message("user", (ImagePart(out.getvalue()), TextPart(ASKED[0]))),), square.sampling
    )
    assert qwen.format.render(other).prompt.ids == qwen.format.render(square).prompt.ids
    ids, ended = answered(submitted(engine, qwen.format, other))
    assert again[0] == first[0] and again[1].cached_tokens > 0
    assert ended.cached_tokens < other_place(qwen, other)
    assert ids == qwen.expected(other)


def other_place(qwen: Seeing, asked: ChatRequest) -> int:
    """Where the picture begins: only what stands before it may be shared."""
    return qwen.format.render(asked).prompt.salts[0][0] + 1


def test_a_picture_added_later_leaves_what_came_before_in_the_cache(
    qwen: Seeing, engine: PagedEngine
) -> None:
    first = request(0)
    answer, _ = answered(submitted(engine, qwen.format, first))
    more = (
        *first.messages,
        Message("assistant", (TextPart("A star."),)),
        Message("user", (part(1), TextPart("And this?"))),
    )
    longer = ChatRequest(more, first.sampling)
    ids, ended = answered(submitted(engine, qwen.format, longer))
    before = len(qwen.format.render(first).prompt.ids)
    assert ended.cached_tokens >= before - 2 * 8
    assert ids == qwen.expected(longer)


def test_recomputing_after_preemption_changes_no_answer(
    qwen: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "can_admit", lambda *_args: True)
    asked = [request(number % 3, text=ASKED[number % 2]) for number in range(6)]
    expected = [qwen.expected(one) for one in asked]
    model = qwen.fresh_model()
    tight = create_seeing_engine(
        model,
        eos_ids={int(model.generation_config.eos_token_id)},
        context_length=96,
        device=torch.device("cpu"),
        config=EngineConfig(kv_cache_gb=0.00017, block_size=4, prefill_chunk=24, threads=1),
    )
    try:
        boxes = [submitted(tight, qwen.format, one) for one in asked]
        assert [answered(box)[0] for box in boxes] == expected
        assert tight._scheduler.preemptions > 0
    finally:
        tight.close()


def test_a_pictures_token_that_was_drawn_is_a_word_like_any_other(
    qwen: Seeing, engine: PagedEngine
) -> None:
    token = vision_of(engine)._token
    rendered = qwen.format.render(request(0))
    biased = Sampling(temperature=0.0, max_tokens=4, logit_bias=((token, 100.0),))
    mailbox, beside = BlockingMailbox(), submitted(engine, qwen.format, request(1))
    engine.submit(GenerationRequest(rendered.prompt, biased), mailbox)
    assert answered(mailbox)[0] == [token] * 4
    assert answered(beside)[0] == qwen.expected(request(1))
    raw, next_box = BlockingMailbox(), submitted(engine, qwen.format, request(2))
    plain = GenerationRequest(Prompt((1, token, token, 5)), Sampling(temperature=0, max_tokens=3))
    engine.submit(plain, raw)
    assert len(answered(raw)[0]) <= 3
    assert answered(next_box)[0] == qwen.expected(request(2))


def test_the_cache_of_features_keeps_the_latest_within_its_bytes() -> None:
    rows = Features(torch.zeros(10, 4))
    cache = FeatureCache(most_bytes=3 * rows.bytes)
    for number in range(4):
        cache.put("t", bytes([number]), rows)
    assert [cache.get("t", bytes([n])) is not None for n in range(4)] == [False, True, True, True]
    cache.get("t", b"\x01")
    cache.put("t", b"\x09", rows)
    assert cache.get("t", b"\x01") is not None and cache.get("t", b"\x02") is None
    cache.put("t", b"\x0a", Features(torch.zeros(100, 4)))
    assert cache.get("t", b"\x0a") is None and cache.get("t", b"\x09") is not None
    assert cache.get("u", b"\x09") is None


def test_what_belongs_to_each_picture_is_told_from_the_tensors() -> None:
    grid = torch.tensor([[1, 2, 2], [1, 2, 4]])
    patches = torch.arange(12.0)[:, None]
    (a, first), (b, second) = separate(
        {"pixel_values": patches, "image_grid_thw": grid}, (b"a", b"b")
    )
    assert (a, b) == (b"a", b"b")
    assert first["pixel_values"].tolist() == patches[:4].tolist()
    assert second["pixel_values"].tolist() == patches[4:].tolist()
    assert second["image_grid_thw"].tolist() == [[1, 2, 4]]
    stacked = {
        "pixel_values": torch.zeros(2, 3, 4, 4),
        "image_sizes": torch.tensor([[1, 2], [3, 4]]),
        "batch_num_images": torch.tensor([2]),
    }
    _, (_, second) = separate(stacked, (b"a", b"b"))
    assert second["image_sizes"].tolist() == [[3, 4]]
    assert second["batch_num_images"].tolist() == [2]
    tiles = {"pixel_values": torch.zeros(1, 7, 3, 4, 4)}
    assert separate(tiles, (b"a", b"b")) == [(b"ab", tiles)]


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Llava"])
def test_a_step_that_only_goes_on_after_its_pictures_is_one_of_plain_ids(
    family: str, tmp_path: Path
) -> None:
    """What a captured GPU step computes: plain ids at shifted positions, by the stock model."""
    seeing = Seeing(tmp_path, FAMILIES[family])
    engine = engine_of(seeing, block_size=8, prefill_chunk=32)
    runner = engine._runner
    vision = vision_of(engine)
    plain_steps = []

    class Steps:
        def plain_draws(self, choices: object) -> None:
            return None

        def logits(self, layout: Layout, ids: list[int], rows: list[int]) -> torch.Tensor:
            plain_steps.append(layout.shifts)
            runner._backend.begin(layout)
            out = runner._model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.from_numpy(layout.positions)[None],
                use_cache=False,
                logits_to_keep=torch.tensor(rows, dtype=torch.long),
                paged=runner._backend,
            )
            return out.logits[0]  # type: ignore[no-any-return]

    runner._steps = Steps()  # type: ignore[assignment]
    try:
        asked = conversations()
        boxes = [submitted(engine, seeing.format, one) for one in asked]
        assert [answered(box)[0] for box in boxes] == [seeing.expected(one) for one in asked]
    finally:
        engine.close()
    assert len(plain_steps) >= ANSWER - 2
    assert any(any(shifts) for shifts in plain_steps) == vision._has_axes


def test_one_at_a_time_still_means_choices_seeds_cancelling_and_turns(tmp_path: Path) -> None:
    seeing = Seeing(tmp_path, FAMILIES["Gemma 3"])
    engine = engine_of(seeing)
    try:
        rendered = seeing.format.render(request(0, 1))
        drawn = Sampling(temperature=1.0, seed=5, max_tokens=6, n=2, logprobs=2, ignore_eos=True)
        endless = Sampling(temperature=0.0, ignore_eos=True)
        told: list[dict[int, list[int]]] = []
        stuck = BlockingMailbox()
        number = engine.submit(GenerationRequest(rendered.prompt, endless), stuck)
        boxes = [BlockingMailbox(), BlockingMailbox()]
        for box in boxes:
            engine.submit(GenerationRequest(rendered.prompt, drawn), box)
        behind = submitted(engine, seeing.format, request(2))
        engine.cancel(number)
        assert [m for m in stuck if isinstance(m, Ended)][0].outcome == "cancelled"
        for box in boxes:
            found: dict[int, list[int]] = {}
            for message in box:
                if isinstance(message, Tokens):
                    found.setdefault(message.choice, []).extend(message.ids)
                    assert len(message.scores) == len(message.ids)
                elif isinstance(message, Ended):
                    assert (message.outcome, message.cached_tokens) == ("finished", 0)
            told.append(found)
        assert told[0] == told[1], "the same seed draws the same ids"
        assert told[0][0] != told[0][1] and all(len(ids) == 6 for ids in told[0].values())
        assert answered(behind)[0] == seeing.expected(request(2))
    finally:
        engine.close()


def test_on_a_gpu_the_cache_leaves_room_for_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10 * 2**30, 80 * 2**30))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert with_room(EngineConfig(), gpu).kv_cache_gb == pytest.approx(7.0)
    assert with_room(EngineConfig(kv_cache_gb=2.0), gpu).kv_cache_gb == 2.0
    assert with_room(EngineConfig(), cpu).kv_cache_gb is None
