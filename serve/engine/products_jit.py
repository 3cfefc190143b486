"""Products of 8-bit inputs with packed 4 or 8-bit weights, and what threads need to share them.

Numba has no vectors, so the inner loop is written in LLVM's own language: sixteen outputs at a
time, four inputs an instruction (`vpdpbusd` where the processor has it). A row's sums are made in
one order whatever stands beside it, so its numbers are the same in any batch. Knows addresses only;
called by step_jit.py.
"""

# Numba's functions are compiled from their arguments' types at run time, and llvmlite has no types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
LANES = ir.VectorType(I32, 16)
FLOATS = ir.VectorType(F32, 16)
HALVES = ir.VectorType(F16, 16)
HALF_LANES = ir.VectorType(I32, 8)

_libc = ctypes.CDLL(None)
give_way = _libc.sched_yield
give_way.argtypes = []
give_way.restype = ctypes.c_int


@cache
def instructions() -> str | None:
    """The processor's best way to multiply bytes; None where there is none that this module can
    use."""
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("avx2", "fma", "f16c")):
        return None
    if features.get("avx512vnni") and features.get("avx512vl"):
        return "avx512vnni"
    return "avxvnni" if features.get("avxvnni") else "avx2"


def tile_product(kind: str, bits: int, rows: int) -> Any:
    """product(weights, inputs, scales, out, blocks), all addresses but the last: `out` [rows, 16]
    float32 is one tile of packed weights times `rows` rows of inputs, int8 [rows, 32 * blocks] with
    (scale, scale * sum) float32 for each block [rows, blocks, 2]."""

    @intrinsic
    def product(typing, weights, inputs, scales, out, blocks):
        def generate(context, builder, signature, arguments):
            _emit(builder, kind, bits, rows, *arguments)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 5)), generate

    return product


def _emit(
    b: Any, kind: str, bits: int, rows: int, weights: Any, inputs: Any, scales: Any, out: Any,
    blocks: Any,
) -> None:  # fmt: skip
    fma = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(FLOATS, [FLOATS] * 3), "llvm.fma.v16f32"
    )
    zeros = ir.Constant(FLOATS, [0.0] * 16)
    sums = [cgutils.alloca_once_value(b, zeros) for _ in range(rows)]
    with cgutils.for_range(b, blocks) as loop:
        block = b.add(weights, b.mul(loop.index, I64(64 * bits + 64)))
        quads = _quads(b, block, bits)
        scale, offset = (
            b.fpext(_load(b, b.add(block, I64(64 * bits + 32 * n)), HALVES, 32), FLOATS)
            for n in range(2)
        )
        for row in range(rows):
            at = b.add(b.mul(blocks, I64(row)), loop.index)
            whole = ir.Constant(LANES, [0] * 16)
            for n, quad in enumerate(quads):
                four = _load(b, b.add(inputs, b.add(b.mul(at, I64(32)), I64(4 * n))), I32, 4)
                whole = _add_dot(b, kind, bits, whole, quad, _spread(b, four))
            pair = b.add(scales, b.mul(at, I64(8)))
            own = _spread(b, _load(b, pair, F32, 4))
            own_sum = _spread(b, _load(b, b.add(pair, I64(4)), F32, 4))
            made = b.call(fma, [offset, own_sum, b.load(sums[row])])
            made = b.call(fma, [b.fmul(scale, own), b.sitofp(whole, FLOATS), made])
            b.store(made, sums[row])
    for row in range(rows):
        place = b.inttoptr(b.add(out, I64(64 * row)), FLOATS.as_pointer())
        b.store(b.load(sums[row]), place, align=4)


def _quads(b: Any, block: Any, bits: int) -> list[Any]:
    """A block's levels as eight vectors of 16 outputs by 4 inputs."""
    found = [_load(b, b.add(block, I64(64 * n)), LANES, 64) for n in range(bits)]
    if bits == 8:
        return found
    low = ir.Constant(LANES, [0x0F0F0F0F] * 16)
    four = ir.Constant(LANES, [4] * 16)
    return [half for both in found for half in (b.and_(both, low), b.and_(b.lshr(both, four), low))]


def _add_dot(b: Any, kind: str, bits: int, sums: Any, levels: Any, inputs: Any) -> Any:
    """sums + the dot products of four unsigned levels and four signed inputs in each lane."""
    if kind == "avx512vnni":
        name, made = "llvm.x86.avx512.vpdpbusd.512", ir.FunctionType(LANES, [LANES] * 3)
        return b.call(cgutils.get_or_insert_function(b.module, made, name), [sums, levels, inputs])
    halves = []
    for low in (0, 8):
        lanes = ir.Constant(HALF_LANES, list(range(low, low + 8)))
        parts = [b.shuffle_vector(v, v, lanes) for v in (sums, levels, inputs)]
        halves.append(_add_half_dot(b, kind, bits, *parts))
    return b.shuffle_vector(*halves, ir.Constant(LANES, list(range(16))))


def _add_half_dot(b: Any, kind: str, bits: int, sums: Any, levels: Any, inputs: Any) -> Any:
    if kind == "avxvnni":
        name, made = "llvm.x86.avx512.vpdpbusd.256", ir.FunctionType(HALF_LANES, [HALF_LANES] * 3)
        return b.call(cgutils.get_or_insert_function(b.module, made, name), [sums, levels, inputs])
    if bits == 4:
        return b.add(sums, _pairs(b, levels, inputs, 1))
    # Sums of two products of 8-bit levels overflow 16 bits: four bits of them at a time.
    low, four = ir.Constant(HALF_LANES, [0x0F0F0F0F] * 8), ir.Constant(HALF_LANES, [4] * 8)
    sums = b.add(sums, _pairs(b, b.and_(levels, low), inputs, 1))
    return b.add(sums, _pairs(b, b.and_(b.lshr(levels, four), low), inputs, 16))


def _pairs(b: Any, levels: Any, inputs: Any, factor: int) -> Any:
    bytes_, words = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
    multiply = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(words, [bytes_, bytes_]), "llvm.x86.avx2.pmadd.ub.sw"
    )
    join = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(HALF_LANES, [words, words]), "llvm.x86.avx2.pmadd.wd"
    )
    twos = b.call(multiply, [b.bitcast(levels, bytes_), b.bitcast(inputs, bytes_)])
    return b.call(join, [twos, ir.Constant(words, [factor] * 16)])


def _load(b: Any, address: Any, kind: Any, align: int) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=align)


def _spread(b: Any, value: Any) -> Any:
    """One number in all sixteen lanes."""
    kind = ir.VectorType(value.type, 16)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    lanes = ir.Constant(LANES, [0] * 16)
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), lanes)


# -- small things that Numba lacks -----------------------------------------------------------------


@intrinsic
def float_of_bits(typing, bits):
    """The float32 whose bits are an int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


@intrinsic
def pointer(typing, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def fetch_add(typing, address):
    """Count up the int64 at an address that threads share: what it was."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", place, I64(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def fetch(typing, address):
    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(typing):
    """What a thread does that waits for another for a moment."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(
            cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), []
        )
        return context.get_dummy_value()

    return types.void(), generate
