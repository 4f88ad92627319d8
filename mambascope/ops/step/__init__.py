"""One token through a Mamba layer, fused: the launches around the kernels of ``ops.step.kernels``.

For a few rows of a batch, where every weight is read once and nothing else matters. Rows beyond `MOST_ROWS` are better
served by matrix products. Importing this needs Triton.
"""

# pyright: reportMissingImports=false

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambascope.ops.scan.triton_launch import launch
from mambascope.ops.scan.triton_math import INTERPRETED
from mambascope.ops.step.kernels import enter_kernel, leave_kernel, logits_kernel, pick_kernel, state_kernel

__all__ = ["MOST_ROWS", "MOST_STOPS", "Choice", "Head", "Layer", "Scratch", "head", "layer", "pick", "unfit"]

MOST_ROWS = 8
MOST_STOPS = 16
_COLUMNS = 2048  # of a row that are loaded ahead
_TILE = 256  # columns of a tile of such a row, a quarter of those of a longer one
_ENTER, _STATE, _LEAVE, _LOGITS = 16, 32, 8, 16  # rows of a tile, as measured on an H100
_WARPS = {"enter": 16, "state": 4, "leave": 8, "logits": 8, "pick": 8}
_REGISTERS: dict[str, int] = {}  # at most that many a thread, where a kernel would take more than lets all programs run
_overlap: dict[torch.device, bool] = {}


def _cdiv(n: int, size: int) -> int:
    return -(-n // size)


def _power(n: int) -> int:
    """The power of two that n ≥ 1 fits into."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Layer:
    """A layer's weights, each contiguous, as the model holds them; None where it has none."""

    norm: Tensor  # M
    in_proj: Tensor  # 2D M
    in_bias: Tensor | None
    conv: Tensor  # D K
    conv_bias: Tensor | None
    x_proj: Tensor  # R+2N D
    dt_proj: Tensor  # D R
    dt_bias: Tensor | None
    A_log: Tensor  # D N
    D: Tensor
    out_proj: Tensor  # M D
    out_bias: Tensor | None
    eps: float
    mixer_eps: float | None


@dataclass(frozen=True)
class Head:
    """The final norm and the embeddings."""

    norm: Tensor  # M
    unembed: Tensor  # V M
    embed: Tensor  # V M
    eps: float


@dataclass(frozen=True)
class Scratch:
    """What the kernels of a layer hand to each other."""

    z: Tensor  # B D
    u: Tensor
    gated: Tensor
    shares: Tensor  # B tiles R+2N

    @classmethod
    def of(cls, weights: Layer, batch: int) -> "Scratch":
        channels = weights.A_log.shape[0]
        row = weights.in_proj.new_empty((batch, channels))
        shares = row.new_empty((batch, _cdiv(channels, _ENTER), weights.x_proj.shape[0]), dtype=torch.float32)
        return cls(row, torch.empty_like(row), torch.empty_like(row), shares)


@dataclass(frozen=True)
class Choice:
    """The greedy choice's memory: the tiles' best, stop tokens (-1 where none), and what was chosen."""

    best: Tensor  # B tiles
    where: Tensor
    stops: Tensor  # MOST_STOPS
    done: Tensor  # B, int32
    ids: Tensor  # B
    told: Tensor  # B most
    count: Tensor  # B: columns of told that are filled

    @classmethod
    def of(cls, weights: Head, batch: int, most: int) -> "Choice":
        def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weights.norm.device)

        tiles = _cdiv(weights.unembed.shape[0], _LOGITS)
        best, where = new(batch, tiles, dtype=torch.float32), new(batch, tiles, dtype=torch.int32)
        done, ids = new(batch, dtype=torch.int32), new(batch)
        return cls(best, where, new(MOST_STOPS).fill_(-1), done, ids, new(batch, most), new(batch))


def unfit(weights: Layer, head: Head) -> str:
    """'' if the kernels can take these weights, else the reason in words."""
    size, rank, states = weights.in_proj.shape[1], weights.dt_proj.shape[1], weights.A_log.shape[1]
    channels = weights.A_log.shape[0]
    if max(size, channels) > 8 * _COLUMNS or rank > 1024 or states > 256:
        return f"d_model {size}, d_inner {channels}, dt_rank {rank} or d_state {states} is too large for them"
    for owner in (weights, head):
        for name, value in vars(owner).items():
            if isinstance(value, Tensor) and not value.is_contiguous():
                return f"the weight {name} is not contiguous"
    return ""


def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends: Hopper and later."""
    if INTERPRETED or device.type != "cuda":
        return False
    if device not in _overlap:
        _overlap[device] = torch.cuda.get_device_capability(device)[0] >= 9
    return _overlap[device]


def _columns(n: int) -> dict[str, int]:
    """Columns of a tile, a warp's worth of 16-byte loads where rows are short, and tiles that are loaded ahead."""
    columns = min(_TILE if n <= _COLUMNS else 4 * _TILE, _power(n))
    return {"BK": columns, "PRE": max(1, min(-(-n // columns), _COLUMNS // columns))}


def _options(kernel: str, overlap: bool) -> dict[str, Any]:
    """Triton's options of a launch, and whether it may start early."""
    found: dict[str, Any] = {"PDL": overlap, "num_warps": _WARPS[kernel]}
    if overlap:
        found["launch_pdl"] = True
    if kernel in _REGISTERS and not INTERPRETED:
        found["maxnreg"] = _REGISTERS[kernel]
    return found


def layer(w: Layer, resid: Tensor, ssm: Tensor, conv: Tensor, scratch: Scratch, first: bool) -> None:
    """One token through a layer: ``resid`` ``B M``, ``ssm`` ``B D N`` and ``conv`` ``B D K-1`` are updated in place.

    ``first``: of its token; it starts only when everything before it is complete.
    """
    batch, size = resid.shape
    channels, states = w.A_log.shape
    rank, width, joint = w.dt_proj.shape[1], w.conv.shape[1], w.x_proj.shape[0]
    tiles = _cdiv(channels, _ENTER)
    overlap = _overlaps(resid.device)

    launch(
        enter_kernel, 2 * tiles * batch, resid.device,
        resid, w.norm, w.in_proj, w.in_bias, w.conv, w.conv_bias, conv, w.x_proj, scratch.z, scratch.u, scratch.shares,
        w.eps, batch,
        M=size, D=channels, J=joint, JP=_power(joint), K=width, KP=_power(width),
        BR=_ENTER, **_columns(size), HAS_IN_BIAS=w.in_bias is not None, HAS_CONV_BIAS=w.conv_bias is not None,
        **_options("enter", overlap and not first),
    )  # fmt: skip
    launch(
        state_kernel, _cdiv(channels, _STATE) * batch, resid.device,
        scratch.shares, w.dt_proj, w.dt_bias, w.A_log, w.D, ssm, scratch.u, scratch.z, scratch.gated,
        w.mixer_eps or 0.0, batch,
        D=channels, N=states, NP=_power(states), R=rank, RP=_power(rank), TILES=tiles,
        TP=_power(tiles), BD=_STATE, HAS_DT_BIAS=w.dt_bias is not None, NORMED=w.mixer_eps is not None,
        **_options("state", overlap),
    )  # fmt: skip
    launch(
        leave_kernel, _cdiv(size, _LEAVE) * batch, resid.device,
        scratch.gated, w.out_proj, w.out_bias, resid, batch,
        M=size, D=channels, BR=_LEAVE, **_columns(channels), HAS_OUT_BIAS=w.out_bias is not None,
        **_options("leave", overlap),
    )  # fmt: skip


def head(w: Head, resid: Tensor, logits: Tensor, choice: Choice | None) -> None:
    """Logits ``B V`` of the residual stream; for a greedy ``choice`` also each tile's best token."""
    (batch, size), vocabulary = resid.shape, w.unembed.shape[0]
    best, where = (None, None) if choice is None else (choice.best, choice.where)
    launch(
        logits_kernel, _cdiv(vocabulary, _LOGITS) * batch, resid.device,
        resid, w.norm, w.unembed, logits, best, where, w.eps, batch,
        M=size, V=vocabulary, BR=_LOGITS, **_columns(size), BEST=choice is not None,
        **_options("logits", _overlaps(resid.device)),
    )  # fmt: skip


def pick(w: Head, resid: Tensor, choice: Choice) -> None:
    """Choose the most likely tokens of the last `head` and put their embeddings into ``resid``."""
    (batch, size), (vocabulary, tiles) = resid.shape, (w.embed.shape[0], choice.best.shape[1])
    launch(
        pick_kernel, batch, resid.device,
        choice.best, choice.where, choice.stops, choice.done, choice.ids, choice.told, choice.count, w.embed, resid,
        M=size, MP=_power(size), TILES=tiles, TP=_power(tiles), V=vocabulary, STOPS=MOST_STOPS,
        MOST=choice.told.shape[1], **_options("pick", _overlaps(resid.device)),
    )  # fmt: skip
