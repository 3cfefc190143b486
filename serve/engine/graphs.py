"""A decoder layer's products on a CPU as ONNX Runtime graphs over 4 or 8-bit weights.

A decode step reads every weight for a few rows, so its time is the weights' bytes. ONNX Runtime's
MatMulNBits reads them as blocks of 32 with one scale each, and inputs as 8-bit blocks too (as
llama.cpp does). Weights that came from a GGUF file's Q4_0, Q4_1 or Q8_0 blocks are found again
exactly; others are rounded to 8 bits. Norms, biases, gate and residuals run inside the graph, so
that a layer is two calls. Knows layers of modules.py; called by decoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper

from serve.engine.modules import JoinedLayer

BLOCK = 32
_OPSETS = (("", 17), ("com.microsoft", 1))
_IR_VERSION = 9
_ACCURACY = 4  # inputs as 8-bit blocks; 1 would be float32, many times slower
_TYPES = {"f": TensorProto.FLOAT, "u": TensorProto.UINT8, "i": TensorProto.INT64}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [out, in] as w = scale (level - middle) + offset, one scale and offset for 32
    neighbours. `levels` uint8 [out, in / 32, 32 * bits / 8], two 4-bit levels a byte, low first;
    `scales` and `offsets` float32 [out, in / 32], offsets None where all are zero. `is_exact`: it
    is the matrix, not a rounding of it."""

    bits: int
    levels: npt.NDArray[np.uint8]
    scales: Floats
    offsets: Floats | None
    is_exact: bool


def blocks(weight: Floats, least_bits: int = 4) -> Blocks:
    """The fewest bits, at least `least_bits`, that hold the matrix exactly, else 8. Q4_1 and Q4_0
    as in GGUF: 16 levels from the smallest value to the largest, or 16 multiples of an eighth of
    the largest magnitude; Q8_0: multiples of a 127th of it."""
    cells = weight.reshape(weight.shape[0], -1, BLOCK)
    lowest, highest = cells.min(-1), cells.max(-1)
    for scales, offsets in (
        ((highest - lowest) / 15, lowest),
        (np.where(-lowest > highest, -lowest, -highest) / 8, None),
    ):
        made = _rounded(cells, scales, offsets, 0 if offsets is not None else -8, 4)
        if made.is_exact and least_bits <= 4:
            return made
    return _rounded(cells, np.maximum(-lowest, highest) / 127, None, -127, 8)


def _rounded(
    cells: Floats, scales: Floats, offsets: Floats | None, least: int, bits: int
) -> Blocks:
    """Cells [out, blocks, 32] as scale * n + offset for whole n from `least` on."""
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    shifted = cells if offsets is None else cells - offsets[..., None]
    whole = np.rint(shifted / scales[..., None])
    error = np.abs(shifted - whole * scales[..., None])
    middle = 2 ** (bits - 1)
    most = least + 2**bits - (1 if bits == 4 else 2)
    inside = (whole >= least) & (whole <= most)
    is_exact = bool(((error <= 1e-3 * np.abs(scales)[..., None]) & inside).all())
    levels = (np.clip(whole, least, most) + (0 if offsets is not None else middle)).astype(np.uint8)
    if bits == 4:
        levels = levels[..., 0::2] | (levels[..., 1::2] << 4)
    shift = None if offsets is None else offsets + middle * scales
    return Blocks(bits, np.ascontiguousarray(levels), scales, shift, is_exact)


class Graph:
    """Builds one session: tensors in and out are float32 [rows, width]."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self._sums: dict[str, str] = {}

    def tensor(self, values: npt.NDArray[Any]) -> str:
        name = f"t{len(self._tensors)}"
        values = np.ascontiguousarray(values)
        kind = _TYPES[values.dtype.kind]
        self._tensors.append(
            helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True)
        )
        return name

    def node(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        name = f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def reshape(self, x: str, *shape: int) -> str:
        return self.node("Reshape", x, self.tensor(np.array(shape, np.int64)))

    def norm(self, x: str, norm: Any) -> str:
        """RMSNorm over the last axis; `norm` is a stock module with weight and epsilon."""
        weight = self.tensor(norm.weight.detach().float().numpy())
        epsilon = float(norm.variance_epsilon)
        return self.node(
            "SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1
        )

    def product(self, x: str, weight: Blocks, bias: Floats | None = None) -> str:
        """x W' + b. MatMulNBits has no offsets: they times the sums of x's blocks are a small
        product of their own."""
        out, count = weight.scales.shape
        made = self.node(
            "MatMulNBits",
            x,
            self.tensor(weight.levels),
            self.tensor(weight.scales.reshape(-1)),
            domain="com.microsoft",
            K=count * BLOCK,
            N=out,
            bits=weight.bits,
            block_size=BLOCK,
            accuracy_level=_ACCURACY,
        )
        if weight.offsets is not None:
            if x not in self._sums:
                cells = self.reshape(x, -1, count, BLOCK)
                last = self.tensor(np.array([2], np.int64))
                self._sums[x] = self.node("ReduceSum", cells, last, keepdims=0)
            made = self.node("Gemm", self._sums[x], self.tensor(weight.offsets.T), made)
        return made if bias is None else self.node("Add", made, self.tensor(bias))

    def session(
        self, inputs: Sequence[tuple[str, int]], outputs: Sequence[str], threads: int
    ) -> Any:
        def tensor(name: str, width: int | None) -> Any:
            shape: list[str | int | None] | None = None if width is None else ["rows", width]
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self._nodes,
            "layer",
            [tensor(name, width) for name, width in inputs],
            [tensor(output, None) for output in outputs],
            self._tensors,
        )
        opsets = [helper.make_opsetid(*pair) for pair in _OPSETS]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A waiting thread that spins takes the core that the server and the other rows need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def opening(first: JoinedLayer, threads: int) -> Any:
    """x [rows, width] -> (queries, keys, values of the first layer, not turned)."""
    graph = Graph()
    made = _before_attention(graph, "x", first)
    return graph.session([("x", first.qkv.weight.shape[1])], [made], threads)


def between(layer: JoinedLayer, following: JoinedLayer, threads: int) -> Any:
    """(x [rows, width], seen [rows, heads * dim]) -> (the layer's output [rows, width], queries,
    keys, values of the layer that follows)."""
    graph = Graph()
    out = _after_attention(graph, layer)
    return graph.session(_inputs(layer), [out, _before_attention(graph, out, following)], threads)


def closing(last: JoinedLayer, norm: Any, threads: int) -> Any:
    """(x, seen) -> (what the head reads [rows, width],)"""
    graph = Graph()
    return graph.session(_inputs(last), [graph.norm(_after_attention(graph, last), norm)], threads)


def heads(weight: Floats, pieces: int, threads: int) -> list[tuple[Any, slice]]:
    """x [rows, width] -> (logits [rows, these columns of the vocabulary],), piece by piece."""
    made: list[tuple[Any, slice]] = []
    low = 0
    for piece in np.array_split(weight, pieces):
        graph = Graph()
        product = graph.product("x", blocks(piece))
        session = graph.session([("x", weight.shape[1])], [product], threads)
        made.append((session, slice(low, low + len(piece))))
        low += len(piece)
    return made


def _inputs(layer: JoinedLayer) -> list[tuple[str, int]]:
    return [("x", layer.out.weight.shape[0]), ("seen", layer.out.weight.shape[1])]


def _before_attention(graph: Graph, x: str, layer: JoinedLayer) -> str:
    """[rows, (heads + 2 kv heads) * dim]"""
    made = _linear(graph, graph.norm(x, layer.stock.input_layernorm), layer.qkv)
    if layer.q_norm is None:
        return made
    queries, keys = layer.heads * layer.dim, layer.kv_heads * layer.dim
    parts = []
    for low, width, norm in (
        (0, queries, layer.q_norm),
        (queries, keys, layer.k_norm),
        (queries + keys, keys, None),
    ):
        part = _columns(graph, made, low, low + width)
        if norm is not None:
            heads = graph.norm(graph.reshape(part, 0, -1, layer.dim), norm)
            part = graph.reshape(heads, -1, width)
        parts.append(part)
    return graph.node("Concat", *parts, axis=1)


def _after_attention(graph: Graph, layer: JoinedLayer) -> str:
    """[rows, width] of the tensors "x" and "seen"."""
    x = graph.node("Add", "x", _linear(graph, "seen", layer.out))
    inside = graph.norm(x, layer.stock.post_attention_layernorm)
    mlp = layer.stock.mlp
    gate, up = (
        graph.product(inside, blocks(part.weight.detach().numpy()), _bias(part))
        for part in (mlp.gate_proj, mlp.up_proj)
    )
    gated = graph.node("QuickGelu", gate, domain="com.microsoft", alpha=1.0)  # this is SiLU
    return graph.node("Add", x, _linear(graph, graph.node("Mul", gated, up), layer.down))


def _linear(graph: Graph, x: str, projection: Any) -> str:
    return graph.product(x, blocks(projection.weight.detach().numpy()), _bias(projection))


def _bias(linear: Any) -> Floats | None:
    made: Floats | None = None if linear.bias is None else linear.bias.detach().float().numpy()
    return made


def _columns(graph: Graph, x: str, low: int, high: int) -> str:
    ends = [graph.tensor(np.array([n], np.int64)) for n in (low, high, 1)]
    return graph.node("Slice", x, *ends)
