"""AWQ and GPTQ checkpoints loaded as on a GPU, their layers computed by our kernels (in Triton's
interpreter), against the weights they mean."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from pathlib import Path

import pytest

pytest.importorskip("triton")

from serve.engine.kernels import w4
from serve.quantization import linear4
from tests.test_quantization import load_path, logits
from tests.tiny_quantized import quantized_llama


@pytest.mark.parametrize(
    ("method", "group", "act_order", "form", "few"),
    [
        ("awq", 32, False, "gptq", 256),
        ("awq", 64, False, "gptq", 0),
        ("gptq", 32, True, "gptq", 256),
        ("gptq", 32, True, "gptq_v2", 0),
        ("gptq", -1, False, "gptq", 256),
    ],
)
def test_a_packed_checkpoint_answers_as_the_weights_it_means(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    group: int,
    act_order: bool,
    form: str,
    few: int,
) -> None:
    monkeypatch.setattr(linear4, "runs_kernels", lambda device: True)
    monkeypatch.setattr(w4, "w4_linear", w4.fast)
    monkeypatch.setattr(w4, "FEW", few)
    packed, plain = quantized_llama(tmp_path, method, group=group, act_order=act_order, form=form)
    ours = load_path(packed, tmp_path)
    layer = ours.model.model.layers[0].mlp.down_proj
    assert isinstance(layer, linear4.Linear4) and layer._kernel is not None
    meant = logits(load_path(plain, tmp_path))
    off = (logits(ours) - meant).abs().max() / meant.abs().max()
    assert off < 1e-5


def test_a_group_that_the_kernels_do_not_take_is_computed_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear4, "runs_kernels", lambda device: True)
    monkeypatch.setattr(w4, "takes", lambda inputs, group: False)
    packed, plain = quantized_llama(tmp_path, "gptq", group=16)
    ours, meant = logits(load_path(packed, tmp_path)), logits(load_path(plain, tmp_path))
    assert (ours - meant).abs().max() / meant.abs().max() < 1e-5
