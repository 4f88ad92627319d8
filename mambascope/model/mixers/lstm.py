"""A long short-term memory (Hochreiter and Schmidhuber 1997; forget gates of Gers et al. 2000), open where one looks.

    i, f, o = sigmoid(W x[t] + U h[t-1] + b),   g = tanh(…)            ``hook_i``, ``hook_f``, ``hook_o``, ``hook_g``
    c[t] = f c[t-1] + i g,   h[t] = o tanh(c[t])                       ``hook_cell``, ``hook_hidden``;   out_proj(h)

Nobody looking inside: torch's ``nn.LSTM``. A step at which somebody looks is spelled out between two stretches of it.
All six points are in the recurrence: a hook is called once for every addressed step, in order, with its ``B D``, and
an edit changes everything after it. On a GPU cuDNN runs it, forward in float32 as IEEE has it; its gradients are
torch's to decide, which are TF32 unless ``torch.backends.cudnn.rnn.fp32_precision`` says "ieee".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mambascope.config import MambaConfig
from mambascope.errors import HookError
from mambascope.hooks.run import PathTaken, Run, compute_dtype
from mambascope.hooks.state_point import StatePoint
from mambascope.model.mixers.base import Mixer, hooked, project
from mambascope.model.mixers.states import LSTMState
from mambascope.model.mixers.stepwise import Steps, left_in

__all__ = ["LSTMMixer"]

Pair = tuple[Tensor, Tensor]  # h, c: B D each


class LSTMMixer(Mixer):
    """One layer of ``d_inner`` cells. Its parameters and states stay float32 in bf16 models: errors would add up.

    Initialisation: torch's, uniform in ±1/√D, but the forget gate's bias is 1 (Jozefowicz et al. 2015).
    """

    letter = "l"
    state_type = LSTMState
    inner = "mixer.hook_hidden"

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__(cfg)
        self.lstm = nn.LSTM(cfg.d_model, cfg.d_inner, batch_first=True)
        self.out_proj = nn.Linear(cfg.d_inner, cfg.d_model, bias=cfg.proj_bias)
        with torch.no_grad():
            forget = slice(cfg.d_inner, 2 * cfg.d_inner)
            _, _, from_input, from_hidden = self.lstm.all_weights[0]
            from_input[forget] = 1.0
            from_hidden[forget] = 0.0
        self.hook_i = StatePoint()
        self.hook_f = StatePoint()
        self.hook_g = StatePoint()
        self.hook_o = StatePoint()
        self.hook_cell = StatePoint()
        self.hook_hidden = StatePoint()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LSTMMixer":
        """As in torch, but the recurrence's parameters stay float32 in a bf16 or fp16 model."""

        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.dtype in (torch.bfloat16, torch.float16) else out

        for name, module in self.named_children():
            module._apply(keep if name == "lstm" else fn)
        return super()._apply(fn, recurse=False)

    def train(self, mode: bool = True) -> "LSTMMixer":
        """As in torch; the LSTM itself is always in training mode (it has no dropout): cuDNN has no backward else."""
        super().train(mode)
        self.lstm.train()
        return self

    @property
    def placed(self) -> Tensor:
        """A weight that tells the mixer's device and dtype."""
        return self.out_proj.weight

    def initial_state(self, batch: int) -> LSTMState:
        """Zeros."""
        like = self.out_proj.weight
        zeros = torch.zeros(batch, self.cfg.d_inner, device=like.device, dtype=compute_dtype(like.dtype))
        return LSTMState(zeros, zeros.clone())

    def core(self, batch: int, length: int, dtype: torch.dtype) -> Callable[[], None] | None:
        """The recurrence, forward and backward, in the parameters' dtype."""
        like = self.lstm.all_weights[0][0]
        x = torch.randn(batch, length, self.cfg.d_model, device=like.device, dtype=like.dtype, requires_grad=True)
        g = torch.randn(batch, length, self.cfg.d_inner, device=like.device, dtype=like.dtype)

        def step() -> None:
            with torch.autocast(x.device.type, enabled=False), _ieee(x.device):
                torch.autograd.grad(self.lstm(x)[0], [x, *self.lstm.parameters()], g)

        return step

    def forward(self, r: Tensor, run: Run, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """Mix the normalised residual ``B L M``; the output ``B L M`` and h, c after the last real token."""
        if type(self.lstm) is not nn.LSTM or hooked(self.lstm):
            raise HookError(
                f"{self.hook_hidden.name}: lstm was exchanged or carries a hook of torch's own, which would not fire "
                "for every token; hook hook_cell or hook_hidden"
            )
        # A copy: the bits of a matrix product depend on where in memory its factors lie.
        state = self.initial_state(r.shape[0]) if state is None else state.map(torch.clone)
        padding = run.padding
        aligned = padding is not None and padding.any_left
        with torch.autocast(r.device.type, enabled=False), _ieee(r.device):
            x = r.to(self.lstm.all_weights[0][0].dtype)
            x = padding.align(x) if aligned and padding is not None else x
            hidden, (h, c), form = self._walk(x, (state.h, state.c), run)
        hidden = padding.unalign(hidden) if aligned and padding is not None else hidden
        self.path = PathTaken("torch", form, "nn.LSTM" if form == "fused" else "a step is read or edited")
        out = project(hidden.to(self.out_proj.weight.dtype), self.out_proj, run.backend)
        return out, LSTMState(h, c)

    def _walk(self, x: Tensor, entry: Pair, run: Run) -> tuple[Tensor, Pair, str]:
        """The hidden sequence ``B L D``, the last h and c, and the form: in one piece, or between edited steps."""
        counts, length = run.lengths, x.shape[1]
        points = [self.hook_i, self.hook_f, self.hook_g, self.hook_o, self.hook_cell, self.hook_hidden]
        steps = Steps(points, run, length)
        now, begin, done, start, pieces = entry, entry, 0, 0, []
        t = steps.after(-1)
        while t is not None:
            if t > done:
                _, now = self._fast(x[:, done:t], now, left_in(counts, done, t))
            after, edited = self._step(x[:, t], now, t, steps)
            if counts is not None:  # a row that has ended keeps its state
                on = (t < counts)[:, None]
                after = (torch.where(on, after[0], now[0]), torch.where(on, after[1], now[1]))
            now = after
            if edited:
                if t > start:
                    pieces.append(self._fast(x[:, start:t], begin, left_in(counts, start, t))[0])
                pieces.append(now[0][:, None])
                begin, start = now, t + 1
            done, t = t + 1, steps.after(t)
        steps.offer()
        if not pieces:  # bits do not depend on who was reading
            hidden, last = self._fast(x, entry, counts)
            return hidden, last, "open" if steps else "fused"
        if start < length:
            hidden, now = self._fast(x[:, start:], begin, left_in(counts, start, length))
            pieces.append(hidden)
        return torch.cat(pieces, 1), now, "split"

    def _step(self, x: Tensor, before: Pair, t: int, steps: Steps) -> tuple[Pair, bool]:
        """One step spelled out: x ``B M`` -> h, c, and whether a hook edited anything."""
        (W, U, b_input, b_hidden), (h, c) = self.lstm.all_weights[0], before
        raw = nn.functional.linear(x, W, b_input) + nn.functional.linear(h, U, b_hidden)  # B 4D
        i, f, g, o = raw.chunk(4, -1)
        i, edited_i = steps.show(self.hook_i, t, torch.sigmoid(i))
        f, edited_f = steps.show(self.hook_f, t, torch.sigmoid(f))
        g, edited_g = steps.show(self.hook_g, t, torch.tanh(g))
        o, edited_o = steps.show(self.hook_o, t, torch.sigmoid(o))
        c, edited_c = steps.show(self.hook_cell, t, f * c + i * g)
        h, edited_h = steps.show(self.hook_hidden, t, o * torch.tanh(c))
        return (h, c), edited_i or edited_f or edited_g or edited_o or edited_c or edited_h

    def _fast(self, x: Tensor, before: Pair, counts: Tensor | None) -> tuple[Tensor, Pair]:
        """``nn.LSTM`` over x ``B W M``; ``counts`` ``B``: of each row only the first so many."""
        if counts is None:
            hidden, after = self.lstm(x, (before[0][None].contiguous(), before[1][None].contiguous()))
            return hidden, (after[0][0], after[1][0])
        rows = counts.nonzero()[:, 0]  # packing wants no empty row
        if len(rows) < len(counts):
            hidden = x.new_zeros(*x.shape[:2], self.cfg.d_inner)
            if not len(rows):
                return hidden, before
            some, after = self._fast(x[rows], (before[0][rows], before[1][rows]), counts[rows])
            return hidden.index_copy(0, rows, some), (
                before[0].index_copy(0, rows, after[0]),
                before[1].index_copy(0, rows, after[1]),
            )
        packed = pack_padded_sequence(x, counts.cpu(), batch_first=True, enforce_sorted=False)
        out, after = self.lstm(packed, (before[0][None].contiguous(), before[1][None].contiguous()))
        hidden, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        return hidden, (after[0][0], after[1][0])


@contextmanager
def _ieee(device: torch.device) -> Iterator[None]:
    """float32 means float32: cuDNN's recurrences are TF32 by default, off by 1e-3, and would not match a step alone."""
    if device.type != "cuda":
        yield
        return
    rnn: Any = torch.backends.cudnn.rnn
    before, rnn.fp32_precision = rnn.fp32_precision, "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = before
