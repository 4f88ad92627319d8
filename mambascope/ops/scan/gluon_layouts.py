"""Register and shared-memory layouts of the Hopper kernels.

States: tensor ``[BD, NS, NL]``, BD channels, N = NL · NS states, state n = l · NS + s. NS states sit in one thread, NL
lanes share a channel. Steps are taken four at a time (axis K), so that a thread reads four steps of one quantity as
16 bytes of shared memory. A program's channels are kept in the order p = r · BD/2 + e for channel 2 e + r: a thread
that loads two neighbouring channels (r) then writes them where no two lanes meet in a bank.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "group_layout",
    "linear",
    "own_layout",
    "partial_layout",
    "rows_layout",
    "state_layout",
    "sums_layout",
    "transposed_states",
    "turned_rows",
    "turned_sums",
]


@gluon.constexpr_function
def _log2(n: int) -> int:
    return n.bit_length() - 1


@gluon.constexpr_function
def _bases(rank: int, axis: int, size: int) -> list[list[int]]:
    """One basis vector for every bit of an axis of that size."""
    return [[(1 << bit) if i == axis else 0 for i in range(rank)] for bit in range(_log2(size))]


@gluon.constexpr_function
def linear(shape: list[int], registers: list[list[int]], lanes: list[list[int]], warps: list[list[int]]) -> Any:
    """A layout from the bits of registers, lanes and warps, each an axis and its bit."""

    def bases(places: list[list[int]]) -> list[list[int]]:
        return [[1 << bit if i == axis else 0 for i in range(len(shape))] for axis, bit in places]

    return gl.DistributedLinearLayout(bases(registers), bases(lanes), bases(warps), [], shape)


@gluon.constexpr_function
def own_layout(threads: Any, vector: int) -> Any:
    """Shared memory where every thread has its own entries of a linear layout: its first 2^vector side by side, thread
    after thread, and so on."""
    first, others = threads.reg_bases[:vector], threads.reg_bases[vector:]
    return gl.SharedLinearLayout(first + threads.lane_bases + threads.warp_bases + others)


@gluon.constexpr_function
def group_layout(BD: int, NS: int, NL: int, K: int, warps: int) -> Any:
    """``[BD, NS, NL, K]``: K and NS in registers, NL over lanes, channels over the other lanes, then warps.

    The lowest lane bits alternate between states and channels. A 16-byte shared load is served a quarter of a warp at a
    time, and in this order every quarter asks for each address twice: half the wavefronts of any other order.
    """
    registers = _bases(4, 3, K) + _bases(4, 1, NS)
    states, channels = _bases(4, 2, NL), _bases(4, 0, BD)
    mine = 5 - len(states)
    lanes, channels = channels[:mine], channels[mine:]
    if states and lanes:
        lanes = [states[0], lanes[0], *states[1:], *lanes[1:]]
    else:
        lanes = lanes + states
    across = channels[: _log2(warps)]
    rest = channels[_log2(warps) :]
    across = across + [[0, 0, 0, 0]] * (_log2(warps) - len(across))
    return gl.DistributedLinearLayout(registers + rest, lanes, across, [], [BD, NS, NL, K])


@gluon.constexpr_function
def state_layout(BD: int, NS: int, NL: int, warps: int) -> Any:
    """``[BD, NS, NL]``: `group_layout` without its last axis."""
    wide = group_layout(BD, NS, NL, 1, warps)

    def cut(bases: list[list[int]]) -> list[list[int]]:
        return [b[:3] for b in bases]

    return gl.DistributedLinearLayout(cut(wide.reg_bases), cut(wide.lane_bases), cut(wide.warp_bases), [], [BD, NS, NL])


@gluon.constexpr_function
def rows_layout(width: int, per_thread: int, warps: int) -> Any:
    """``[T/4, 4, width/2, 2]``: two neighbouring columns and ``per_thread`` of four steps in a thread."""
    columns = width // 2
    groups = max(1, (32 // columns) // (4 // per_thread))
    return gl.BlockedLayout(
        [1, per_thread, 1, 2], [groups, 4 // per_thread, columns, 1], [warps, 1, 1, 1], [3, 1, 2, 0]
    )


@gluon.constexpr_function
def sums_layout(BD: int, NL: int, per_thread: int, warps: int) -> Any:
    """``[T/4, NL, 2, BD/2, 4]``: `rows_layout` with the NL partial sums of a channel in one thread."""
    columns = BD // 2
    groups = max(1, (32 // columns) // (4 // per_thread))
    return gl.BlockedLayout(
        [1, NL, 2, 1, per_thread], [groups, 1, 1, columns, 4 // per_thread], [warps, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )


@gluon.constexpr_function
def _turned_split(T: int, width: int, warps: int) -> tuple[int, int, int, int, int]:
    """Of a tile whose steps are neighbours in memory: lanes over groups of four steps, lanes over columns, warps over
    each, columns of a pair in one thread. Eight lanes with neighbouring columns meet in no bank."""
    groups = T // 4
    lanes = min(4, groups)
    across = min(warps, max(1, groups // lanes))
    return lanes, 32 // lanes, across, warps // across, 2 if T * width >= 256 * warps else 1


@gluon.constexpr_function
def turned_rows(T: int, width: int, warps: int) -> Any:
    """`rows_layout` where time is dense in memory: four steps of a column in a thread."""
    groups, columns, across, beside, own = _turned_split(T, width, warps)
    rest = 2 // own
    return gl.BlockedLayout([1, 4, 1, own], [groups, 1, columns // rest, rest], [across, 1, beside, 1], [1, 2, 3, 0])


@gluon.constexpr_function
def turned_sums(T: int, BD: int, NL: int, warps: int) -> Any:
    """`sums_layout` for `turned_rows`."""
    groups, columns, across, beside, own = _turned_split(T, BD, warps)
    rest = 2 // own
    return gl.BlockedLayout(
        [1, NL, own, 1, 4], [groups, 1, rest, columns // rest, 1], [across, 1, 1, beside, 1], [4, 3, 2, 1, 0]
    )


@gluon.constexpr_function
def transposed_states(lead: list[int], NS: int, NL: int, K: int) -> Any:
    """Shared ``[*lead, N, K]`` in which state n = l · NS + s lies at place s · NL + l: the scan's loads read NL
    neighbouring 16-byte words."""
    rank = len(lead) + 2
    bases = _bases(rank, rank - 1, K)
    n = _bases(rank, rank - 2, NS * NL)
    bases += n[_log2(NS) :] + n[: _log2(NS)]
    for axis in range(len(lead) - 1, -1, -1):
        bases += _bases(rank, axis, lead[axis])
    return gl.SharedLinearLayout(bases)


@gluon.constexpr_function
def partial_layout(lead: list[int], NL: int, BD: int, split: bool) -> Any:
    """Shared ``[*lead, NL, BD, 4]``, or with ``split`` the same bytes as ``[*lead, NL, 2, BD/2, 4]``.

    Each lane's partial sums of y, 16 bytes for four steps. The words are placed so that neither the scan's stores (lane
    bits n0 c0 n1 …) nor the loads of those who add them up (channel bits 0…2) meet in a bank.
    """
    rank = len(lead) + (4 if split else 3)
    at = len(lead)

    def word(*places: tuple[str, int]) -> list[int]:
        out = [0] * rank
        for kind, bit in places:
            if kind == "n":
                out[at] ^= 1 << bit
            elif split and bit == _log2(BD) - 1:
                out[at + 1] ^= 1
            else:
                out[at + (2 if split else 1)] ^= 1 << bit
        return out

    bases = _bases(rank, rank - 1, 4)
    if NL >= 4:
        bases += [word(("c", 0)), word(("n", 0)), word(("n", 1)), word(("c", 1), ("n", 0)), word(("c", 2), ("n", 1))]
        used = 2
    elif NL == 2:
        bases += [word(("c", 0)), word(("c", 1)), word(("n", 0)), word(("c", 2), ("n", 0))]
        used = 1
    else:
        bases += [word(("c", 0)), word(("c", 1)), word(("c", 2))]
        used = 0
    bases += [word(("c", bit)) for bit in range(3, _log2(BD))] + [word(("n", bit)) for bit in range(used, _log2(NL))]
    for axis in range(len(lead) - 1, -1, -1):
        bases += _bases(rank, axis, lead[axis])
    return gl.SharedLinearLayout(bases)
