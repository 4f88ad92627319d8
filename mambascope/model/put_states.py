"""One block run many times with another state put in at one step of each run: what is the same in all runs runs once.

Norm, projections and conv read nothing of the state, so they run for the text alone. Of the recurrence each run needs
what follows its step, which is one scan: h put in at the start, delta = 0 up to and including the step.
"""

import torch
from torch import Tensor

from mambascope import ops
from mambascope.hooks.run import Run
from mambascope.model.mixer import MambaMixer
from mambascope.model.norm import RMSNorm
from mambascope.model.state import MambaState

__all__ = ["put_states"]


def put_states(
    mixer: MambaMixer, norm: RMSNorm, resid: Tensor, state: MambaState | None, steps: Tensor, h: Tensor, run: Run
) -> Tensor:
    """The residual stream ``P B L M`` after a block, from that before it, ``B L M``, and its ``state`` there.

    ``steps`` ``P``: in the p-th run the state after this step is ``h[p]``, ``B D N``, whatever the text says.
    """
    backend, (count, batch) = run.backend, h.shape[:2]
    x = mixer.scan_inputs(norm(resid, run), run, state)
    A, columns = mixer.decay(), torch.arange(resid.shape[1], device=resid.device)

    def each(value: Tensor) -> Tensor:
        return value.expand(count, *value.shape).flatten(0, 1)  # P·B …

    later = (columns > steps[:, None])[:, None, :, None]  # P 1 L 1
    delta = torch.where(later, x.delta, 0.0).flatten(0, 1)  # P·B L D
    plain = ops.selective_scan(x.u, x.delta, A, x.B, x.C, h0=None if state is None else state.ssm, backend=backend)
    put = ops.selective_scan(each(x.u), delta, A, each(x.B), each(x.C), h0=h.flatten(0, 1), backend=backend)
    from_step = (columns >= steps[:, None])[:, None, :, None]  # P 1 L 1
    y = torch.where(from_step, put.y.unflatten(0, (count, batch)), plain.y)  # P B L D
    skip = x.u.to(y.dtype) * mixer.D.to(y.dtype)  # B L D
    out = mixer.leave(y.flatten(0, 1), each(skip), each(x.z), run)
    return resid + out.unflatten(0, (count, batch))
