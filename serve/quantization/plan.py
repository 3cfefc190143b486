"""Decides from a config alone how weights will be held and whether they fit, before any download.

`plan` obeys the checkpoint's own quantization (QUANT_TYPE=auto) or refuses what cannot be, with
numbers and a fix. Imports no torch. Called by loader.py; README's table of types says the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve.quantization.machine import Machine, has_gptqmodel
from serve.settings import QuantType

Method = Literal[
    "full", "mxfp4", "awq", "gptq", "gptqmodel", "bnb4", "int8", "bitsandbytes", "gguf"
]  # fmt: skip
DType = Literal["float32", "bfloat16", "float16"]

BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
MXFP4_BYTES = 17 / 32  # per parameter: 32 halves of a byte and one scale
LAYOUTS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}
FOREIGN_BITS = {"awq": (2, 3, 5, 6, 7, 8), "gptq": (2, 3, 8)}  # gptqmodel's, through transformers
PACKED_BYTES = 0.56  # bnb4 (NF4, double quantized), as measured over whole layers
GGUF_BITS = {
    "mxfp4": 4.25, "q2": 2.6, "q3": 3.4, "q4": 4.6, "q5": 5.6, "q6": 6.6, "q8": 8.5,
    "bf16": 16.0, "f16": 16.0, "f32": 32.0,
}  # fmt: skip


class Refused(Exception):
    """A model cannot be held here: why (with the numbers), and what to set."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Plan:
    """`bytes_needed` is loading's peak, with room to work; `notes` are said to the operator."""

    method: Method
    dtype: DType
    bytes_needed: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Weights:
    """What is known of a checkpoint before it is loaded."""

    config: Mapping[str, Any]
    stored_bytes: int

    @property
    def stored_as(self) -> str:
        quantization = self.config.get("quantization_config") or {}
        return str(quantization.get("quant_method", "")).lower()

    @property
    def text(self) -> Mapping[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    @property
    def experts(self) -> int:
        names = ("num_local_experts", "num_experts", "n_routed_experts")
        return max(int(self.text.get(name) or 0) for name in names)

    @property
    def stored_dtype(self) -> str:
        named = self.config.get("dtype") or self.config.get("torch_dtype") or ""
        named = named or self.text.get("dtype") or self.text.get("torch_dtype") or "bfloat16"
        return str(named).removeprefix("torch.")

    def _expert_parameters(self) -> int:
        text = self.text
        width, inner = int(text.get("hidden_size") or 0), int(text.get("intermediate_size") or 0)
        return int(text.get("num_hidden_layers") or 0) * self.experts * 3 * width * inner

    def parameters(self) -> int:
        """Estimated from the bytes stored and how they are stored."""
        if self.stored_as == "mxfp4":
            packed = self._expert_parameters()
            return packed + max(int((self.stored_bytes - packed * MXFP4_BYTES) / 2), 0)
        if self.stored_as in ("awq", "gptq", "bitsandbytes"):
            outside = self.outside_linear()
            return outside + max(int((self.stored_bytes - outside * 2) / 0.53), 0)
        return self.stored_bytes // BYTES.get(self.stored_dtype, 2)

    def outside_linear(self) -> int:
        """Embedding and head, which quantizers leave as they are."""
        size = int(self.text.get("vocab_size") or 0) * int(self.text.get("hidden_size") or 0)
        tied = self.config.get("tie_word_embeddings", self.text.get("tie_word_embeddings", False))
        return size if tied else 2 * size


def plan(weights: Weights, wanted: QuantType, machine: Machine, *, can_hold_mxfp4: bool) -> Plan:
    """How `weights` are held on `machine`. Raises Refused with the numbers and what to set.

    `can_hold_mxfp4`: whether the 4-bit expert layers can run on the machine's device.
    """
    stored = weights.stored_as
    if stored not in ("", "mxfp4", "awq", "gptq", "bitsandbytes"):
        raise Refused(
            f"its weights are quantized as {stored!r}, which is not read here",
            "Use the unquantized model, or an MXFP4, AWQ, GPTQ or bitsandbytes one.",
        )
    if wanted in ("awq", "gptq", "mxfp4") and stored != wanted:
        raise Refused(
            f"QUANT_TYPE={wanted} asks for {wanted.upper()} weights, but these are "
            f"{stored.upper() or 'not quantized'}",
            f"Set QUANT_TYPE=auto, or name a model that is quantized as {wanted.upper()}.",
        )
    if wanted in ("bnb4", "int8"):
        return _converted(weights, wanted, machine)
    if stored == "mxfp4":
        return _mxfp4(weights, wanted, machine, can_hold_mxfp4)
    if stored and wanted == "full":
        raise Refused(
            f"QUANT_TYPE=full would unpack {stored.upper()} weights, which only loses speed",
            "Set QUANT_TYPE=auto, or name the unquantized model.",
        )
    if stored:
        return _packed(weights, stored, machine)
    return _unquantized(weights, wanted, machine)


def plan_gguf(name: str, stored_bytes: int, wanted: QuantType, machine: Machine) -> Plan:
    """A GGUF file is unpacked while it is loaded."""
    if wanted not in ("auto", "full", "int8"):
        raise Refused(
            f"QUANT_TYPE={wanted} cannot be made from a GGUF file, which is unpacked to load it",
            "Set QUANT_TYPE=auto, or name a model with safetensors.",
        )
    bits = next((b for kind, b in GGUF_BITS.items() if re.search(rf"\b{kind}", _words(name))), 4.6)
    parameters = int(stored_bytes * 8 / bits)
    dtype = _compute_dtype(machine)
    needed = _with_room(parameters * BYTES[dtype], machine)
    _must_fit(needed, machine, f"unpacked to {dtype}")
    note = f"the GGUF blocks are unpacked to {dtype} while loading"
    return Plan("int8" if wanted == "int8" else "gguf", dtype, needed, (note,))


def _words(name: str) -> str:
    return re.sub(r"[-_.]+(?=[a-z]*\d)", " ", name.lower())


def _compute_dtype(machine: Machine) -> DType:
    if machine.device == "cpu":
        return "float32"
    return "bfloat16" if machine.has_bf16 else "float16"


def _with_room(weight_bytes: float, machine: Machine) -> int:
    """Weights and room to work: activations and the least useful KV cache."""
    return int(weight_bytes * 1.05) + (800 if machine.device == "cuda" else 200) * 2**20


def _must_fit(needed: int, machine: Machine, how: str, fix: str = "") -> None:
    if needed > machine.free_bytes:
        raise Refused(
            f"it needs {needed / 1e9:.1f} GB of {machine.memory_word} {how}, "
            f"{machine.free_bytes / 1e9:.1f} GB are free on {machine.name}",
            fix or "Use a machine with more memory, or name a smaller model in MODEL_IDS.",
        )


def _unquantized(weights: Weights, wanted: QuantType, machine: Machine) -> Plan:
    parameters = weights.parameters()
    dtype = _compute_dtype(machine)
    needed = _with_room(parameters * BYTES[dtype], machine)
    if needed <= machine.free_bytes:
        return Plan("full", dtype, needed)
    if wanted == "auto" and machine.device == "cpu":
        halved = _with_room(parameters * 2, machine)
        if halved <= machine.free_bytes:
            note = f"held in bfloat16: float32 would need {needed / 1e9:.1f} GB"
            return Plan("full", "bfloat16", halved, (note,))
    if wanted == "auto" and machine.device == "cuda" and not weights.experts:
        try:
            found = _converted(weights, "bnb4", machine)
        except Refused:
            pass
        else:
            note = f"held in 4 bits (bnb4): {dtype} would need {needed / 1e9:.1f} GB"
            return Plan("bnb4", found.dtype, found.bytes_needed, (note,))
    _must_fit(needed, machine, f"in {dtype}", _smaller_fix(weights, machine))
    raise AssertionError("unreachable: it did not fit above")


def _smaller_fix(weights: Weights, machine: Machine) -> str:
    if machine.device == "cuda" and not weights.experts:
        return "Set QUANT_TYPE=bnb4, or name a smaller model in MODEL_IDS."
    return ""


def _converted(weights: Weights, wanted: Literal["bnb4", "int8"], machine: Machine) -> Plan:
    if weights.stored_as:
        raise Refused(
            f"QUANT_TYPE={wanted} cannot be made from weights that are already "
            f"{weights.stored_as.upper()}",
            "Set QUANT_TYPE=auto, or name the unquantized model.",
        )
    if wanted == "int8":
        if machine.device != "cpu":
            raise Refused("QUANT_TYPE=int8 is for the CPU", "Set QUANT_TYPE=auto or bnb4.")
        outside = weights.outside_linear()
        needed = _with_room(weights.parameters() * 3 + outside * 2, machine)
        _must_fit(needed, machine, "while it is turned into int8")
        return Plan("int8", "bfloat16", needed)
    if weights.experts:
        raise Refused(
            "QUANT_TYPE=bnb4 packs only linear layers, and this model keeps nearly all its weights "
            f"in its {weights.experts} experts, which would stay at 16 bits",
            "Set QUANT_TYPE=auto with an MXFP4 checkpoint such as openai/gpt-oss-20b.",
        )
    outside = weights.outside_linear()
    dtype = _compute_dtype(machine)
    packed = (weights.parameters() - outside) * PACKED_BYTES + outside * BYTES[dtype]
    needed = _with_room(packed, machine)
    _must_fit(needed, machine, "in 4 bits (bnb4)")
    return Plan("bnb4", dtype, needed)


def _packed(weights: Weights, stored: str, machine: Machine) -> Plan:
    dtype: DType = "float32" if machine.device == "cpu" else "float16"
    outside = weights.outside_linear()
    needed = _with_room(weights.stored_bytes + outside * (BYTES[dtype] - 2), machine)
    _must_fit(needed, machine, f"as {stored.upper()}")
    if stored == "bitsandbytes":
        return Plan("bitsandbytes", dtype, needed)
    foreign = _foreign_packing(weights, stored)
    if foreign:
        return Plan("gptqmodel", dtype, needed, (f"{foreign}: held by gptqmodel's layers",))
    return Plan("awq" if stored == "awq" else "gptq", dtype, needed)


def _foreign_packing(weights: Weights, method: str) -> str:
    """What of the packing our own layers do not read; "" if they do. Raises Refused where gptqmodel
    would be needed and is not installed."""
    stored = weights.config["quantization_config"]
    bits = int(stored.get("bits") or stored.get("w_bit") or 4)
    named = stored.get("version") if method == "awq" else stored.get("checkpoint_format")
    layout = str(named or LAYOUTS[method][0]).lower()
    told = f"its {method.upper()} weights have {bits} bits in the layout {layout!r}"
    known = " and ".join(repr(one) for one in LAYOUTS[method])
    if layout not in LAYOUTS[method]:
        # gptqmodel has kernels for some, which it compiles with CUDA's compiler when first used.
        raise Refused(f"{told}; {known} can be read here", "Name a model with such weights.")
    if bits == 4:
        return ""
    if bits not in FOREIGN_BITS[method]:
        widths = ", ".join(str(one) for one in sorted((4, *FOREIGN_BITS[method])))
        raise Refused(f"{told}; {widths} can be read", "Name a model with such weights.")
    if not has_gptqmodel(method):
        raise Refused(
            f"{told}; 4 bits in {known} are read without gptqmodel",
            "Install what requirements-gptq.txt says, or name a model with such weights.",
        )
    return told


def _mxfp4(weights: Weights, wanted: QuantType, machine: Machine, can_hold: bool) -> Plan:
    parameters = weights.parameters()
    dtype = _compute_dtype(machine)
    unpacked = _with_room(parameters * BYTES[dtype], machine)
    packed = _with_room(weights.stored_bytes * 1.02, machine)
    if wanted == "full":
        fix = "Set QUANT_TYPE=auto to keep the experts in 4 bits." if can_hold else ""
        _must_fit(unpacked, machine, f"unpacked to {dtype}", fix)
        return Plan(
            "full", dtype, unpacked, (f"MXFP4 unpacked to {dtype}, as QUANT_TYPE=full asks",)
        )
    if wanted == "mxfp4" or (machine.device == "cuda" and can_hold):
        if not can_hold:
            raise Refused(
                f"its experts cannot be computed in MXFP4 on {machine.name}",
                "Set QUANT_TYPE=full to unpack them.",
            )
        _must_fit(packed, machine, "in MXFP4")
        return Plan("mxfp4", dtype, packed)
    if unpacked <= machine.free_bytes:
        note = f"MXFP4 unpacked to {dtype} ({unpacked / 1e9:.1f} GB): no 4-bit experts here"
        return Plan("full", dtype, unpacked, (note,))
    halved = _with_room(parameters * 2, machine)
    if machine.device == "cpu" and halved <= machine.free_bytes:
        note = f"MXFP4 unpacked to bfloat16: float32 would need {unpacked / 1e9:.1f} GB"
        return Plan("full", "bfloat16", halved, (note,))
    fix = "Use a GPU with 16 GB, or name a smaller model in MODEL_IDS."
    if machine.device == "cpu" and packed <= machine.free_bytes:
        # It would fit in 4 bits, but a choice that answers in minutes is not made unasked.
        fix += " QUANT_TYPE=mxfp4 runs it here all the same, at many seconds a token."
    _must_fit(halved, machine, "unpacked to bfloat16", fix)
    raise AssertionError("unreachable: it did not fit above")
