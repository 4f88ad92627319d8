"""Causal attention with rotary positions (Vaswani et al., 1706.03762; Su et al., 2104.09864), open where one looks.

    z[t] = sum_s softmax_s(q[t] k[s] / sqrt(E)) v[s],   s <= t and, with a window W, s > t - W

Nobody looking at scores or pattern: torch's ``scaled_dot_product_attention``, in memory linear in the length. Else both
are spelled out, ``B H T S`` in float32: the same numbers within rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambascope.config import MambaConfig
from mambascope.errors import InputError, StateError
from mambascope.hooks.recorder import compact
from mambascope.hooks.run import PathTaken, Run, compute_dtype
from mambascope.hooks.sites import SitePoint
from mambascope.memory import require_bytes
from mambascope.model.mixers.base import Mixer, project
from mambascope.model.mixers.states import AttentionState, Room

__all__ = ["AttentionMixer", "WindowAttentionMixer"]

_MASK = 1 << 24  # entries of a mask that is made at a time
_NOWHERE = 1 << 62  # the position of a column that holds no token: no query comes after it


class AttentionMixer(Mixer):
    """q, k, v = in_proj(r) in heads; q and k turned by their positions; z = softmax(q k / sqrt(E)) v; out_proj(z)."""

    letter = "a"
    state_type = AttentionState
    inner = "mixer.hook_z"

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__(cfg)
        self.in_proj = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=cfg.proj_bias)
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.proj_bias)
        self.hook_q = SitePoint()
        self.hook_k = SitePoint()
        self.hook_v = SitePoint()
        self.hook_rot_q = SitePoint()
        self.hook_rot_k = SitePoint()
        self.hook_attn_scores = SitePoint(lazy=True, axis=2)
        self.hook_pattern = SitePoint(lazy=True, axis=2)
        self.hook_z = SitePoint()
        self.hook_result = SitePoint(lazy=True)

    @property
    def window(self) -> int | None:
        """How many positions a query sees, itself among them; None: all before it."""
        return None

    def initial_state(self, batch: int) -> AttentionState:
        """No keys and no values."""
        empty = self.placed.new_empty(batch, 0, self.cfg.n_heads, self.cfg.d_head)
        return AttentionState(empty, empty, torch.zeros(batch, dtype=torch.long, device=empty.device))

    def check_state(self, state: AttentionState, like: AttentionState, batch: int, where: str) -> None:
        """As the base; a key-value cache has as many columns as it has."""
        if not isinstance(state, AttentionState):
            raise StateError(f"{where} is {self.noun}, its state must be AttentionState, got {type(state).__name__}")
        columns = state.k.shape[1] if state.k.ndim == 4 else 0
        shape = (batch, columns, self.cfg.n_heads, self.cfg.d_head)
        self.check_tensor(f"{where}: state.k", state.k, like.k, shape)
        self.check_tensor(f"{where}: state.v", state.v, like.v, shape)
        self.check_tensor(f"{where}: state.read", state.read, like.read, (batch,))

    def forward(self, r: Tensor, run: Run, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        """Mix the normalised residual ``B L M``; the output ``B L M`` and keys and values of all that was read."""
        cfg = self.cfg
        qkv = project(r, self.in_proj, run.backend).unflatten(-1, (3, cfg.n_heads, cfg.d_head))  # B L 3 H E
        q, k, v = qkv.unbind(2)
        q = run.emit(self.hook_q, q)
        k = run.emit(self.hook_k, k)
        v = run.emit(self.hook_v, v)
        reach = _Reach(r, run, state, self.window)
        cos, sin = _turns(reach.queries, cfg.d_head, cfg.rotary_base, compute_dtype(q.dtype))
        q = run.emit(self.hook_rot_q, _Turned.apply(q, cos, sin))
        k = run.emit(self.hook_rot_k, _Turned.apply(k, cos, sin))
        keys, values, room = (k, v, None) if state is None else state.followed_by(k, v, run.grows)  # B S H E
        why = self._why_open(run)
        z = self._open(q, keys, values, reach, run) if why else _fused(q, keys, values, reach)
        self.path = PathTaken("torch", "explicit" if why else "sdpa", why or "nobody looks at scores or pattern")
        z = run.emit(self.hook_z, z)
        return self._out(z, run), reach.after(keys, values, room)

    def _why_open(self, run: Run) -> str:
        """Why scores and pattern must be spelled out; empty if they need not."""
        for point in (self.hook_attn_scores, self.hook_pattern):
            if run.exposes(point):
                return f"{str(point.name).rsplit('.', 1)[-1]} is read"
        return ""

    def _open(self, q: Tensor, k: Tensor, v: Tensor, reach: "_Reach", run: Run) -> Tensor:
        """Attention with scores and pattern as tensors ``B H T S``."""
        batch, length, heads, width = q.shape
        wide = compute_dtype(q.dtype)
        need = 3 * batch * heads * length * k.shape[1] * torch.empty((), dtype=wide).element_size()
        what = f"{self.hook_pattern.name}: scores and pattern of {length:,} x {k.shape[1]:,} positions in {heads} heads"
        way_out = "leave hook_attn_scores and hook_pattern alone, or take a shorter text"
        require_bytes(need, q.device, what, way_out, InputError)
        scores = torch.einsum("bthe,bshe->bhts", q.to(wide), k.to(wide)) / math.sqrt(width)
        scores = scores.masked_fill(~reach.allowed(0, length, 0, k.shape[1]), -math.inf)
        scores = run.emit(self.hook_attn_scores, scores)
        pattern = run.emit(self.hook_pattern, scores.softmax(-1))  # B H T S
        return torch.einsum("bhts,bshe->bthe", pattern.to(v.dtype), v)

    def _out(self, z: Tensor, run: Run) -> Tensor:
        if not run.exposes(self.hook_result):
            return project(z.flatten(2), self.out_proj, run.backend)  # B L M
        weight, bias = self.out_proj.weight.unflatten(1, (self.cfg.n_heads, self.cfg.d_head)), self.out_proj.bias
        what = f"{self.hook_result.name} of {self.cfg.n_heads} heads"
        need = z.shape[0] * z.shape[1] * self.cfg.n_heads * self.cfg.d_model * z.element_size()
        require_bytes(need, z.device, what, "leave hook_result alone, or take a shorter text", InputError)
        result, edited = run.emit_checked(self.hook_result, torch.einsum("blhe,mhe->blhm", z, weight.to(z.dtype)))
        if not edited:
            return project(z.flatten(2), self.out_proj, run.backend)
        total = result.sum(2)
        return total if bias is None else total + bias.to(total.dtype)

    def core(self, batch: int, length: int, dtype: torch.dtype) -> Callable[[], None] | None:
        """Scores, softmax and their product with the values, forward and backward."""
        shape, device = (batch, length, self.cfg.n_heads, self.cfg.d_head), self.placed.device
        q, k, v, g = (torch.randn(shape, device=device, dtype=dtype).requires_grad_(i < 3) for i in range(4))
        reach = _Reach(q, Run("torch"), None, self.window)

        def step() -> None:
            torch.autograd.grad(_fused(q, k, v, reach), (q, k, v), g)

        return step


class WindowAttentionMixer(AttentionMixer):
    """Attention that sees the last ``window`` positions only, the query's own among them."""

    letter = "w"

    @property
    def window(self) -> int:
        return self.cfg.window

    def check_state(self, state: AttentionState, like: AttentionState, batch: int, where: str) -> None:
        """As for attention; no more columns than the window can see."""
        super().check_state(state, like, batch, where)
        if state.k.shape[1] >= self.window:
            raise StateError(
                f"{where}: state.k holds {state.k.shape[1]} positions, a window of {self.window} keeps "
                f"{self.window - 1} at most"
            )


class _Reach:
    """Which keys a query of this pass may see: those of its row, not after it, inside the window.

    ``queries``: positions of the given columns, ``1 L`` or ``B L``. Columns of the keys: those of the state, then the
    given ones.
    """

    def __init__(self, like: Tensor, run: Run, state: AttentionState | None, window: int | None) -> None:
        self.batch, self.length = like.shape[:2]
        self.padding, self.state, self.window = run.padding, state, window
        self.past = 0 if state is None else state.k.shape[1]
        self.plain = run.padding is None and (state is None or state.even)  # positions and columns go together
        columns = torch.arange(self.length, device=like.device)[None]  # 1 L
        if run.padding is not None:
            columns = (columns - run.padding.left[:, None]).clamp_min(0)
        self.queries = columns if state is None else columns + state.read[:, None]
        self._keys: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Positions of the keys' columns, ``1 S`` or ``B S``; no query comes after a column that holds no token."""
        if self._keys is None:
            here = self.queries if self.padding is None else self.queries.masked_fill(~self.padding.mask, _NOWHERE)
            if self.state is not None:
                before = self.state.positions()
                here = torch.cat([before.masked_fill(before < 0, _NOWHERE), here], 1)
            self._keys = here[:1] if self.plain else here
        return self._keys

    def allowed(self, first: int, last: int, begin: int, end: int) -> Tensor:
        """Whether queries [first, last) may see the keys' columns [begin, end): ``1|B 1 T S``."""
        q, k = self.queries[: 1 if self.plain else None, first:last, None], self.keys[:, None, begin:end]
        may = k <= q
        if self.window is not None:
            may = may & (k > q - self.window)
        if self.padding is not None:  # a padded query sees itself: a softmax over nothing is NaN
            columns = torch.arange(begin, end, device=q.device)
            may = may | (columns == self.past + torch.arange(first, last, device=q.device)[:, None])
        return may[:, None]

    def after(self, keys: Tensor, values: Tensor, room: Room | None) -> AttentionState:
        """The state with these columns read too; they lie in ``room`` if there is one."""
        total, even = keys.shape[1], self.plain
        before = 0 if self.state is None else self.state.read
        keep = total if self.window is None else min(total, self.window - 1)
        if self.padding is None:
            read = torch.full((self.batch,), self.length, device=keys.device) + before
        else:
            read = self.padding.lengths + before
            keep = min(keep, int(read.max()))
            at = read[:, None] + torch.arange(-keep, 0, device=keys.device)  # B keep: positions
            old = at - before[:, None] if isinstance(before, Tensor) else at  # from the first given token on
            columns = torch.where(old < 0, self.past + old, self.past + self.padding.left[:, None] + old)
            rows = torch.arange(self.batch, device=keys.device)[:, None]
            columns = columns.clamp(0, total - 1)
            return AttentionState(keys[rows, columns], values[rows, columns], read, False)
        if keep < total:
            keys, values = keys[:, total - keep :], values[:, total - keep :]
        if room is None and not keys.requires_grad:
            keys, values = compact(keys), compact(values)
        return AttentionState(keys, values, read, even, room)


def _fused(q: Tensor, k: Tensor, v: Tensor, reach: _Reach) -> Tensor:
    """Attention ``B L H E`` without scores: in one go where the mask is a triangle or nothing, else in blocks."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B H L E
    length, total = q.shape[2], k.shape[2]
    attend = F.scaled_dot_product_attention
    if reach.plain and (reach.window is None or total <= reach.window):
        if reach.past == 0:
            return attend(q, k, v, is_causal=True).transpose(1, 2)
        if length == 1:
            return attend(q, k, v).transpose(1, 2)
    if reach.window is not None and reach.plain:
        size = max(reach.window, 128)
    else:
        size = max(1, _MASK // (total * (1 if reach.plain else q.shape[0])))
    out = []
    for a in range(0, length, size):
        b = min(a + size, length)
        end = reach.past + b
        begin = max(0, reach.past + a - reach.window + 1) if reach.window is not None and reach.plain else 0
        mask = reach.allowed(a, b, begin, end)
        out.append(attend(q[:, :, a:b], k[:, :, begin:end], v[:, :, begin:end], attn_mask=mask))
    return (torch.cat(out, 2) if len(out) > 1 else out[0]).transpose(1, 2)


def _turns(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i / width), ``1|B L 1 width/2`` (2104.09864, equation 15)."""
    rates = base ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width)
    angles = positions[..., None].double() * rates  # float32 would lose the angle's digits beyond 10^5 positions
    return angles.cos().to(dtype)[:, :, None], angles.sin().to(dtype)[:, :, None]


class _Turned(torch.autograd.Function):
    """``B L H E`` with channels i and i + E/2 turned as a pair: computed in cos's dtype, rounded once to x's.

    One function, because its gradient is the turn back: autograd would keep and pass over three wide tensors more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        one, two = x.chunk(2, -1)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        first, second = out.chunk(2, -1)
        torch.addcmul(one * cos, two, sin, value=-1, out=first)
        torch.addcmul(two * cos, one, sin, out=second)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _Turned.apply(grads[0], cos, -sin), None, None
