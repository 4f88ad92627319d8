"""What the Hopper kernels share: the portable kernels' arithmetic, and loads and stores of tiles of rows."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mambascope.ops.scan import triton_math

__all__ = [
    "LN2",
    "LOG2E",
    "by_channel",
    "by_state",
    "columns",
    "decay",
    "exp2",
    "group_of",
    "load_tile",
    "paired",
    "pitches_of",
    "places",
    "prefetch",
    "product",
    "row_of",
    "sigmoid",
    "sigmoids",
    "silu",
    "softplus",
    "state_places",
    "tile_offsets",
    "wide_tile",
]

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
MINUS_LOG2E = gl.constexpr(-1.4426950408889634)
EXP2_SHIFT = gl.constexpr(triton_math.EXP2_SHIFT.value)

# The same source as in the portable kernels, so that a fused scan and the elementwise kernels give the same bits.
decline = gluon.jit(triton_math.decline.fn)
product = gluon.jit(triton_math.product.fn)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def sigmoid(x):
    """`triton_math.sigmoid`, bit for bit: the flushed reciprocal is 0 where that one says so."""
    return _reciprocal(1.0 + decline(x))


@gluon.jit
def sigmoids(x):
    """`triton_math.sigmoids`, bit for bit: its divisors are 1 to 2."""
    e = decline(gl.abs(x))
    large = _reciprocal(1.0 + e)
    small = e * large
    return gl.where(x >= 0.0, large, small), gl.where(x >= 0.0, small, large)


@gluon.jit
def silu(x):
    return x * sigmoid(x)


@gluon.jit
def softplus(x):
    """`triton_math.softplus`, bit for bit, without what its division does for divisors from 2^126 on: here they are
    2 to 3."""
    e = decline(gl.abs(x))
    r = e * _reciprocal(2.0 + e)
    s = r * r
    p = gl.fma(s, 0.13433775305747986, 0.14116977155208588)
    p = gl.fma(s, p, 0.2000383585691452)
    p = gl.fma(s, p, 0.33333319425582886)
    p = gl.fma(s, p, 1.0)
    return gl.fma(2.0 * r, p, gl.maximum(x, 0.0))


@gluon.jit
def exp2(x):
    """One instruction: without ``ftz`` the compiler surrounds it with code for denormal results."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def decay(a, dt):
    """exp(A delta) of a step, from a = A · log2(e)."""
    return exp2(gl.fma(a, dt[:, None, None], EXP2_SHIFT))


@gluon.jit
def columns(x, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """``[*SHAPE, 4]`` → the four tensors ``SHAPE`` of its last axis."""
    even, odd = gl.split(x.reshape(SHAPE + [2, 2]))
    c0, c2 = gl.split(even)
    c1, c3 = gl.split(odd)
    return (
        gl.convert_layout(c0, LAYOUT),
        gl.convert_layout(c1, LAYOUT),
        gl.convert_layout(c2, LAYOUT),
        gl.convert_layout(c3, LAYOUT),
    )


@gluon.jit
def group_of(c0, c1, c2, c3, SHAPE: gl.constexpr):
    """The tensor ``[*SHAPE, 4]`` of four columns."""
    return gl.join(gl.join(c0, c2), gl.join(c1, c3)).reshape(SHAPE + [4])


@gluon.jit
def state_places(
    block, D: gl.constexpr, N: gl.constexpr, BD: gl.constexpr, NS: gl.constexpr, NL: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """A program's channels ``[BD]``, and places of its states ``[BD, NS, NL]`` in ``D N``, with which of them exist."""
    p = gl.arange(0, BD, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    ch = block * BD + (p % (BD // 2)) * 2 + p // (BD // 2)
    s = gl.arange(0, NS, gl.SliceLayout(1, gl.SliceLayout(0, LAYOUT)))
    lane = gl.arange(0, NL, gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    n = (lane * NS)[None, :] + s[:, None]
    inside = (ch < D)[:, None, None] & (n < N)[None, :, :]
    return ch, (ch * N)[:, None, None] + n[None, :, :], inside


@gluon.jit
def places(T: gl.constexpr, width: gl.constexpr, LAYOUT: gl.constexpr):
    """Step ``[T/4, 4, 1, 1]`` and column ``[1, 1, width/2, 2]`` of the entries of a tile of rows."""
    group = gl.arange(0, T // 4, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    step = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    pair = gl.arange(0, width // 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    one = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    t = (group * 4)[:, None, None, None] + step[None, :, None, None]
    return t, (pair * 2)[None, None, :, None] + one[None, None, None, :]


@gluon.jit
def paired(rows, PACKED: gl.constexpr):
    """A pointer to bfloat16 as one to pairs of them."""
    if PACKED:
        return rows.to(gl.pointer_type(gl.int32), bitcast=True)
    else:
        return rows


@gluon.jit
def tile_offsets(
    stride, T: gl.constexpr, width: gl.constexpr, LAYOUT: gl.constexpr, PACKED: gl.constexpr,
    TURNED: gl.constexpr = False,
):  # fmt: skip
    """Offset, step and column of a tile's entries, from its first row on; PACKED: of its pairs of columns; TURNED: time
    is dense in memory, and columns are ``stride`` apart."""
    t, column = places(T, width, LAYOUT)
    if TURNED:
        return t + column * stride, t, column
    elif PACKED:
        L3: gl.constexpr = gl.SliceLayout(3, LAYOUT)
        group = gl.arange(0, T // 4, gl.SliceLayout(1, gl.SliceLayout(2, L3)))
        step = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, L3)))
        pair = gl.arange(0, width // 2, gl.SliceLayout(0, gl.SliceLayout(1, L3)))
        t = (group * 4)[:, None, None] + step[None, :, None]
        column = (pair * 2)[None, None, :]
        return t * (stride // 2) + pair[None, None, :], t, column
    else:
        return t * stride + column, t, column


@gluon.jit
def load_tile(rows, offset, t, column, left, ALL: gl.constexpr, EVEN: gl.constexpr):
    """A tile of rows: zeros from row ``left`` on, unless EVEN says that all of it is there, and from column ``ALL`` on
    if that is not 0."""
    if EVEN and ALL == 0:
        return gl.load(rows + offset)
    inside = (t < left) & (column >= 0)
    if ALL > 0:
        inside = inside & (column < ALL)
    return gl.load(rows + offset, mask=inside, other=0)


@gluon.jit
def wide_tile(x, LAYOUT: gl.constexpr, PACKED: gl.constexpr):
    """What `load_tile` gave, in float32."""
    if PACKED:
        low = (x << 16).to(gl.float32, bitcast=True)
        high = (x & -65536).to(gl.float32, bitcast=True)
        return gl.convert_layout(gl.join(low, high), LAYOUT)
    else:
        return x.to(gl.float32)


@gluon.jit
def prefetch(address):
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def pitches_of(stride, TURNED: gl.constexpr):
    """From step to step, from column to column."""
    if TURNED:
        return 1, stride
    else:
        return stride, 1


@gluon.jit
def row_of(which, u, delta, z, u_l, delta_l, z_l, channel, HAS_Z: gl.constexpr, TURNED: gl.constexpr):
    """Address of a channel's first step, and bytes from step to step, of u (0), delta (1) or z."""
    u_t, u_c = pitches_of(u_l, TURNED)
    delta_t, delta_c = pitches_of(delta_l, TURNED)
    u_size: gl.constexpr = u.dtype.element_ty.primitive_bitwidth // 8
    d_size: gl.constexpr = delta.dtype.element_ty.primitive_bitwidth // 8
    line = gl.where(which == 0, (u + channel * u_c).to(gl.int64), (delta + channel * delta_c).to(gl.int64))
    pitch = gl.where(which == 0, u_t * u_size, delta_t * d_size)
    if HAS_Z:
        z_t, z_c = pitches_of(z_l, TURNED)
        z_size: gl.constexpr = z.dtype.element_ty.primitive_bitwidth // 8
        line = gl.where(which > 1, (z + channel * z_c).to(gl.int64), line)
        pitch = gl.where(which > 1, z_t * z_size, pitch)
    return line, pitch


@gluon.jit
def by_state(x, T: gl.constexpr, width: gl.constexpr):
    """A tile of rows as ``[T/4, width, 4]``, columns in their own order."""
    return gl.permute(x, (0, 2, 3, 1)).reshape([T // 4, width, 4])


@gluon.jit
def by_channel(x, T: gl.constexpr, width: gl.constexpr):
    """A tile of rows as ``[T/4, width, 4]``, even columns first."""
    return gl.permute(x, (0, 3, 2, 1)).reshape([T // 4, width, 4])
