"""Sixteen float32 lanes as one numba value, and the elementary functions of the kernels on them.

`Lanes` is an LLVM `<16 x float>`: one AVX-512 register, two of AVX2, four of SSE or NEON; LLVM splits it. Kernels are
written in it, not in loops left to the auto-vectoriser, because the bits must not depend on what the vectoriser chose:
every lane goes through the same operations in the same order whether it belongs to a full block or to the ragged end
of the channels, in a fused kernel or in a lone softplus. For the same reason nothing here carries fast-math flags.
`fma` is `llvm.fmuladd`: fused where the CPU has the instruction, a rounded product and a sum where it has not, the same
everywhere on one machine.

Addresses are plain int64 byte addresses. The polynomials are our own minimax fits, rounded to float32.
"""

from __future__ import annotations

import inspect
import operator
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from mambascope.ops.cpu.threads import Arguments

WIDTH = 16  # lanes
BYTES = 64  # of one vector

FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR, INT_VECTOR = ir.VectorType(FLOAT, WIDTH), ir.VectorType(INT32, WIDTH)

EXP2 = (
    *(1.0, 0.6931471824645996, 0.24022647738456726, 0.05550359934568405),
    *(0.009618505835533142, 0.0013390806270763278, 0.0001532646274426952),
)  # of 2^f, |f| ≤ 1/2; one term less costs nothing visible in y, but a third of the digits of dA and ddt_bias
EXP = (1.0, 1.0, 0.49999993, 0.1666652, 0.04166839, 0.00836875, 0.00138145)
ATANH = (1.0, 0.33333208, 0.20010764, 0.14000903, 0.14005993)  # atanh(q)/q in q², q ≤ 1/3
ROUND = 12582912.0  # 1.5·2²³: adding it rounds to an integer, which then sits in the low bits
LOG2E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # the high part times a small integer is exact in float32


class LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


Lanes = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: types.Type) -> None:
        super().__init__(manager, frontend_type, VECTOR)


class Emitter:
    """Writes LLVM instructions on `<16 x float>` values through a numba builder."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(VECTOR, [ir.Constant(FLOAT, float(np.float32(value)))] * WIDTH)

    def call(self, name: str, *args: Any) -> Any:
        kind = ir.FunctionType(VECTOR, [VECTOR] * len(args))
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"{name}.v{WIDTH}f32"), args)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.call("llvm.fmuladd", x, y, z)

    def polynomial(self, x: Any, coefficients: Sequence[float]) -> Any:
        result = self.constant(coefficients[-1])
        for c in coefficients[-2::-1]:
            result = self.fma(result, x, self.constant(c))
        return result

    def above(self, x: Any, low: float) -> Any:
        "max(x, low); NaN stays NaN (a comparison with it is false)"
        return self.b.select(self.b.fcmp_ordered("<", x, self.constant(low)), self.constant(low), x)

    def below(self, x: Any, high: float) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", x, self.constant(high)), self.constant(high), x)

    def scale(self, x: Any, rounded: Any) -> Any:
        "x·2^k, k being the integer that `rounded` = k + ROUND holds in its low bits: an addition to the exponent"
        b, shift = self.b, ir.Constant(INT_VECTOR, [ir.Constant(INT32, 23)] * WIDTH)
        return b.bitcast(b.add(b.bitcast(x, INT_VECTOR), b.shl(b.bitcast(rounded, INT_VECTOR), shift)), VECTOR)

    def exp2_product(self, x: Any, y: Any) -> Any:
        """2^(x·y) for x·y ≤ 127: relative error about 1e-7, exactly 1 at 0, exactly 0 below 2^-125; NaN stays NaN.

        The product is never rounded by itself where the CPU has fma, so a tiny x·y loses nothing."""
        b = self.b
        rounded = self.fma(x, y, self.constant(ROUND))
        f = self.fma(x, y, b.fneg(b.fsub(rounded, self.constant(ROUND))))
        result = self.scale(self.polynomial(f, EXP2), rounded)
        return b.select(b.fcmp_ordered("<", rounded, self.constant(ROUND - 125)), self.constant(0), result)

    def nan_above(self, limit: float, x: Any, *factors: Any) -> Any:
        "x, or NaN in the lanes where a product of x and one of the factors exceeds the limit"
        b = self.b
        for factor in factors:
            over = b.fcmp_ordered(">", b.fmul(x, factor), self.constant(limit))
            x = b.select(over, self.constant(np.nan), x)
        return x

    def exp(self, x: Any) -> Any:
        "e^x, relative error < 2e-7, x held to [-87, 88]; ln 2 in two parts, so that large |x| loses nothing"
        b = self.b
        x = self.below(self.above(x, -87.0), 88.0)
        rounded = self.fma(x, self.constant(LOG2E), self.constant(ROUND))
        k = b.fsub(rounded, self.constant(ROUND))
        f = self.fma(k, self.constant(-LN2_LOW), self.fma(k, self.constant(-LN2_HIGH), x))
        return self.scale(self.polynomial(f, EXP), rounded)

    def sigmoid(self, x: Any) -> Any:
        one = self.constant(1)
        return self.b.fdiv(one, self.b.fadd(one, self.exp(self.b.fneg(x))))

    def silu(self, x: Any) -> Any:
        return self.b.fdiv(x, self.b.fadd(self.constant(1), self.exp(self.b.fneg(x))))

    def softplus(self, x: Any) -> Any:
        "ln(1 + e^x) = max(x, 0) + 2·atanh(e/(2 + e)), e = e^-|x|: no cancellation for negative x, no threshold"
        b, zero, two = self.b, self.constant(0), self.constant(2)
        magnitude = self.call("llvm.fabs", x)
        e = self.exp(b.fneg(magnitude))
        e = b.select(b.fcmp_ordered(">", magnitude, self.constant(87.0)), zero, e)
        q = b.fdiv(e, b.fadd(two, e))
        log = b.fmul(b.fmul(two, q), self.polynomial(b.fmul(q, q), ATANH))
        return b.fadd(b.select(b.fcmp_ordered("<", x, zero), zero, x), log)  # NaN < 0 is false: NaN stays

    def sum(self, x: Any) -> Any:
        "the sum of the lanes as a fixed tree: (((i + i+8) + i+4) + i+2) + i+1"
        for half in (8, 4, 2, 1):
            other = [(i + half) % WIDTH for i in range(WIDTH)]
            x = self.b.fadd(x, self.shuffle(x, x, other))
        return self.b.extract_element(x, ir.Constant(INT32, 0))

    def shuffle(self, x: Any, y: Any, lanes: Sequence[int]) -> Any:
        return self.b.shuffle_vector(x, y, ir.Constant(INT_VECTOR, [ir.Constant(INT32, i) for i in lanes]))

    def splat(self, scalar: Any) -> Any:
        undefined = ir.Constant(VECTOR, ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(INT32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(INT_VECTOR, [ir.Constant(INT32, 0)] * WIDTH))

    def pointer(self, address: Any, kind: ir.Type = VECTOR) -> Any:
        return self.b.inttoptr(address, kind.as_pointer())

    def load(self, address: Any) -> Any:
        return self.b.load(self.pointer(address), align=4)

    def store(self, address: Any, value: Any) -> None:
        self.b.store(value, self.pointer(address), align=4)

    def offset(self, address: Any, step: Any, count: int) -> Any:
        return self.b.add(address, self.b.mul(step, ir.Constant(INT64, count)))


def lane_intrinsic(result: types.Type, *args: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Makes `emit(emitter, *values)` a numba intrinsic of that signature, named as the function."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            value = emit(Emitter(builder), *values)
            return context.get_dummy_value() if result is types.void else value

        def define(context: Any, *_types: Any) -> Any:
            return signature(result, *args), generate

        define.__name__, define.__doc__ = emit.__name__, emit.__doc__
        define.__signature__ = inspect.Signature(  # numba reads the arity here
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("context", *"xyzwuv"[: len(args)])]
        )
        return intrinsic(define)

    return decorate


@lane_intrinsic(Lanes, types.int64)
def load(e: Emitter, address: Any) -> Any:
    return e.load(address)


@lane_intrinsic(types.void, types.int64, Lanes)
def store(e: Emitter, address: Any, value: Any) -> None:
    e.store(address, value)


def _part(e: Emitter, lanes: Any, whole: Callable[[], Any], part: Callable[[Any, Any], None]) -> None:
    "`whole` for 16 lanes, else `part` through a 64-byte buffer: no byte outside the row is touched"
    buffer = cgutils.alloca_once(e.b, VECTOR)
    count = e.b.mul(lanes, ir.Constant(INT64, 4))
    full = e.b.icmp_signed("==", lanes, ir.Constant(INT64, WIDTH))
    with e.b.if_else(full, likely=True) as (then, otherwise):
        with then:
            whole()
        with otherwise:
            part(buffer, count)


@lane_intrinsic(Lanes, types.int64, types.int64)
def load_part(e: Emitter, address: Any, lanes: Any) -> Any:
    "the first `lanes` (1…16) floats at the address, zero in the other lanes"
    result = cgutils.alloca_once(e.b, VECTOR)

    def part(buffer: Any, count: Any) -> None:
        e.b.store(e.constant(0), buffer)
        cgutils.raw_memcpy(e.b, buffer, e.pointer(address), count, 1)
        e.b.store(e.b.load(buffer), result)

    _part(e, lanes, lambda: e.b.store(e.load(address), result), part)
    return e.b.load(result)


@lane_intrinsic(types.void, types.int64, Lanes, types.int64)
def store_part(e: Emitter, address: Any, value: Any, lanes: Any) -> None:
    def part(buffer: Any, count: Any) -> None:
        e.b.store(value, buffer)
        cgutils.raw_memcpy(e.b, e.pointer(address), buffer, count, 1)

    _part(e, lanes, lambda: e.store(address, value), part)


@lane_intrinsic(Lanes, types.int64)
def load_splat(e: Emitter, address: Any) -> Any:
    "one float in every lane"
    return e.splat(e.b.load(e.pointer(address, FLOAT), align=4))


@lane_intrinsic(Lanes, types.float32)
def splat(e: Emitter, value: Any) -> Any:
    return e.splat(value)


@lane_intrinsic(types.float32, types.int64)
def load_float(e: Emitter, address: Any) -> Any:
    return e.b.load(e.pointer(address, FLOAT), align=4)


@lane_intrinsic(types.void, types.int64, types.float32)
def store_float(e: Emitter, address: Any, value: Any) -> None:
    e.b.store(value, e.pointer(address, FLOAT), align=4)


@lane_intrinsic(types.int64, types.int64)
def load_int(e: Emitter, address: Any) -> Any:
    return e.b.load(e.pointer(address, INT64), align=8)


@lane_intrinsic(types.int64, types.int64, types.int64)
def fetch_add(e: Emitter, address: Any, amount: Any) -> Any:
    "atomically adds to an int64, gives what was there before: how threads share out the work"
    return e.b.atomic_rmw("add", e.pointer(address, INT64), amount, "monotonic")


@lane_intrinsic(Lanes, Lanes, Lanes, Lanes)
def fma(e: Emitter, x: Any, y: Any, z: Any) -> Any:
    return e.fma(x, y, z)


@lane_intrinsic(Lanes, Lanes, Lanes)
def exp2_product(e: Emitter, x: Any, y: Any) -> Any:
    return e.exp2_product(x, y)


@lane_intrinsic(Lanes, Lanes, Lanes, Lanes)
def nan_where_it_overflows(e: Emitter, x: Any, low: Any, high: Any) -> Any:
    "x, or NaN in the lanes where 2^(x·low) or 2^(x·high) would leave float32"
    return e.nan_above(127.0, x, low, high)


@lane_intrinsic(Lanes, Lanes, Lanes)
def lesser(e: Emitter, x: Any, y: Any) -> Any:
    return e.b.select(e.b.fcmp_ordered("<", y, x), y, x)


@lane_intrinsic(Lanes, Lanes, Lanes)
def greater(e: Emitter, x: Any, y: Any) -> Any:
    return e.b.select(e.b.fcmp_ordered(">", y, x), y, x)


@lane_intrinsic(Lanes, Lanes)
def sigmoid(e: Emitter, x: Any) -> Any:
    return e.sigmoid(x)


@lane_intrinsic(Lanes, Lanes)
def silu(e: Emitter, x: Any) -> Any:
    return e.silu(x)


@lane_intrinsic(Lanes, Lanes)
def softplus(e: Emitter, x: Any) -> Any:
    return e.softplus(x)


@lane_intrinsic(types.float32, Lanes)
def lane_sum(e: Emitter, x: Any) -> Any:
    return e.sum(x)


@lane_intrinsic(Lanes, types.int64)
def sum_each(e: Emitter, address: Any) -> Any:
    "the lane sums of 16 vectors in a row, as one vector: the tree of `lane_sum` for all of them at once"
    rows = [e.load(e.offset(address, ir.Constant(INT64, BYTES), i)) for i in range(WIDTH)]
    half = WIDTH // 2
    while half:
        # each row holds the partial sums of WIDTH/2/half vectors, 2·half lanes each; two rows become one
        low = [start + i for start in range(0, 2 * WIDTH, 2 * half) for i in range(half)]
        high = [i + half for i in low]
        pairs = [(rows[i], rows[i + half]) for i in range(half)]
        rows = [e.b.fadd(e.shuffle(x, y, low), e.shuffle(x, y, high)) for x, y in pairs]
        half //= 2
    order = [int(f"{i:04b}"[::-1], 2) for i in range(WIDTH)]
    return e.shuffle(rows[0], rows[0], order)


@lane_intrinsic(types.void, types.int64)
def prefetch(e: Emitter, address: Any) -> None:
    "a hint that the cache line will be read soon (rows lie pages apart: the hardware does not guess them)"
    pointer = e.pointer(address, ir.IntType(8))
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT32, INT32, INT32])
    function = e.b.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
    e.b.call(function, [pointer, ir.Constant(INT32, 0), ir.Constant(INT32, 3), ir.Constant(INT32, 1)])


@lane_intrinsic(types.void, types.int64, types.int64, types.int64, types.int64)
def transpose(e: Emitter, source: Any, source_step: Any, target: Any, target_step: Any) -> None:
    "16 rows of 16 floats, the steps being bytes between rows, written as columns"
    rows = [e.load(e.offset(source, source_step, i)) for i in range(WIDTH)]
    for half in (8, 4, 2, 1):  # exchanges the off-diagonal blocks of size `half`
        for i in range(WIDTH):
            if not i & half:
                x, y = rows[i], rows[i + half]
                upper = [j if not j & half else j - half + WIDTH for j in range(WIDTH)]
                lower = [j + half if not j & half else j + WIDTH for j in range(WIDTH)]
                rows[i], rows[i + half] = e.shuffle(x, y, upper), e.shuffle(x, y, lower)
    for i, row in enumerate(rows):
        e.store(e.offset(target, target_step, i), row)


@intrinsic
def _address_of(context: Any, array: types.Array) -> Any:
    "the address of an array's first element; the array must be kept alive by `keep`"

    def generate(context: Any, builder: Any, sign: Any, values: Any) -> Any:
        data = context.make_array(sign.args[0])(context, builder, values[0]).data
        return builder.ptrtoint(data, INT64)

    return signature(types.int64, array), generate


@intrinsic
def _keep(context: Any, array: types.Array) -> Any:
    "does nothing, after everything that uses the array's memory by address: numba frees an array at its last mention"

    def generate(context: Any, _builder: Any, _signature: Any, _values: Any) -> Any:
        return context.get_dummy_value()

    return signature(types.void, array), generate


address_of: Any = _address_of
keep: Any = _keep


def reader(arguments: Arguments) -> Any:
    """An intrinsic that gives a kernel its arguments as a named tuple, from the address it was called with."""
    kind = types.NamedUniTuple(types.int64, len(arguments.names), namedtuple("KernelArguments", arguments.names))

    def read(context: Any, address: types.Type) -> Any:
        def generate(context: Any, builder: Any, sign: Any, values: Any) -> Any:
            e = Emitter(builder)
            slots = [builder.add(values[0], ir.Constant(INT64, 8 * i)) for i in range(len(arguments.names))]
            loaded = [builder.load(e.pointer(slot, INT64), align=8) for slot in slots]
            return context.make_tuple(builder, sign.return_type, loaded)

        return signature(kind, types.int64), generate

    return intrinsic(read)


def _operator(symbol: Callable[..., Any], emit: Callable[[ir.IRBuilder, Any, Any], Any]) -> None:
    class Template(ConcreteTemplate):
        cases: ClassVar = [signature(Lanes, Lanes, Lanes)]

    register: Any = infer_global(symbol)
    register(Template)

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return emit(builder, *values)

    lower_builtin(symbol, Lanes, Lanes)(generate)


_operator(operator.add, lambda b, x, y: b.fadd(x, y))
_operator(operator.sub, lambda b, x, y: b.fsub(x, y))
_operator(operator.mul, lambda b, x, y: b.fmul(x, y))
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y))
