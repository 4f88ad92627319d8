"""Kernel backends as `torch.library` operators, so that autograd, torch.compile, export and tracing see them.

One registration serves every backend whose module keeps the kernel interface: ``mambascope::selective_scan_cpu``,
``mambascope::selective_scan_triton``, and so on. They are for those who must see them: compilers, exporters, tracers,
modes, tensor subclasses. In plain eager mode an operator call would cost more than many a kernel. There the front ends
call the kernels themselves (`direct`), or for gradients an ordinary autograd function with the operator's own body and
formula (`call`).

Scan and convolution have backward kernels, whose own derivative is refused by name; the elementwise operators and the
norm are differentiated by torch formulas, to any order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import BackendError
from mambascope.ops.checks import compute_dtype
from mambascope.ops.dispatch import KERNEL_BACKENDS, scan_module
from mambascope.ops.operator_bodies import CONV_GRADS, SCAN_GRADS, SCHEMAS, Fakes, Kernels
from mambascope.ops.ready import plain, unwatched

__all__ = [
    "SCAN_GRADS",
    "arriving_at_scan",
    "call",
    "direct",
    "function",
    "kept_interval",
    "norm_gradients",
    "norm_kernel",
    "registered",
    "scan",
    "scan_gradients",
]

REPLAY_INTERVAL = 64
"""Steps between the states that are kept for the backward pass, unless the kernels name their own."""


def direct(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called without its operator: plain tensors, no gradient, nobody tracing."""
    if not unwatched() or not plain(tensors):
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def call(operator: str, backend: str, *args: Any) -> Any:
    """An operator of a kernel backend: its eager twin where nobody looks, else the registered one."""
    if unwatched() and plain([x for x in args if isinstance(x, Tensor)]):
        return function(operator, backend).apply(None, *args)
    return registered(operator, backend, *args)


def registered(operator: str, backend: str, *args: Any) -> Any:
    """The operator that torch knows."""
    return getattr(torch.ops.mambascope, f"{operator}_{backend}")(*args)


_functions: dict[tuple[str, str], Any] = {}


def function(operator: str, backend: str) -> Any:
    """The eager twin of an operator: an autograd function of what runs its forward, None for the operator's own body,
    and the operator's arguments."""
    return _functions[operator, backend]


def _preferred_interval(backend: str, device: torch.device, dtype: torch.dtype, states: int) -> int:
    module = scan_module(backend)
    own = getattr(module, "preferred_interval", None)
    return own(device, dtype, states) if own else getattr(module, "REPLAY_INTERVAL", REPLAY_INTERVAL)


_preferred_interval._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch.resolve_backend


def replay_interval(boundaries: int | None, preferred: int) -> int:
    """Spacing of the states kept for backward: a divisor of ``boundaries`` near the preferred one."""
    if boundaries is None:
        return preferred
    if boundaries <= 2 * preferred:
        return boundaries
    fitting = [n for n in range(preferred // 4, 2 * preferred + 1) if boundaries % n == 0]
    return max(fitting, default=boundaries)


def scan(
    backend: str, inputs: Sequence[Tensor | None], dt_softplus: bool, boundaries: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scan operator; ``inputs`` are u, delta, A, B, C, D, z, dt_bias, h0, lengths."""
    interval = kept_interval(backend, inputs, boundaries)
    return _asked_for(call("selective_scan", backend, *inputs, dt_softplus, interval), interval, boundaries)


def kept_interval(backend: str, inputs: Sequence[Tensor | None], boundaries: int | None) -> int:
    """Steps between the states that a call saves, for the caller or for its backward pass; 0: none."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return boundaries or 0
    u, A = inputs[0], inputs[2]
    assert u is not None
    assert A is not None
    return replay_interval(boundaries, _preferred_interval(backend, u.device, u.dtype, A.shape[1]))


def _asked_for(found: Any, interval: int, boundaries: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    y, h_last, h_boundary = found
    if boundaries is None:
        return y, h_last, None
    return y, h_last, h_boundary if interval == boundaries else h_boundary[:, :: boundaries // interval]


def _given(grads: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else g for g, x in zip(grads, inputs, strict=True)]


def _gradients(
    backend: str, operator: str, names: Sequence[str], args: Sequence[Any], options: dict[str, Any]
) -> list[Tensor | None]:
    """Gradients of the first inputs: from the kernels at once, or from the operator for whoever must see it, and for
    the graph of a second derivative, which it refuses."""
    likes = args[: len(names)]
    if not torch.is_grad_enabled() and unwatched() and plain([x for x in args if x is not None]):
        module = scan_module(backend)
        kernel = module.scan_backward if operator == "selective_scan_backward" else module.conv_backward
        found = kernel(*args, **options)
        return [
            None if x is None else g if g.dtype == x.dtype else g.to(x.dtype)
            for g, x in zip((found[name] for name in names), likes, strict=True)
        ]
    return _given(registered(operator, backend, *args, *options.values()), likes)


def scan_gradients(backend: str, args: Sequence[Any], options: dict[str, Any]) -> list[Tensor | None]:
    """Of u, delta, A, B, C, D, z, dt_bias, h0; ``args``: the ten inputs, boundary states, `arriving_at_scan`."""
    return _gradients(backend, "selective_scan_backward", SCAN_GRADS, args, options)


def arriving_at_scan(
    inputs: Sequence[Any], dy: Tensor | None, dh_last: Tensor | None, dh_boundary: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients at the scan's outputs as the kernels take them."""
    u, z = inputs[0], inputs[6]
    if dy is None:
        dy = torch.zeros(u.shape, dtype=compute_dtype(*inputs[:9]) if z is None else u.dtype, device=u.device)
    dh_last = None if dh_last is None else dh_last.contiguous()
    return dy.contiguous(), dh_last, None if dh_boundary is None else dh_boundary.contiguous()


def _scan_autograd(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.dt_softplus, ctx.boundaries = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dy: Any, dh_last: Tensor | None, dh_boundary: Tensor | None) -> Any:
        *inputs, h_boundary = ctx.saved_tensors
        if ctx.boundaries < 1:
            raise BackendError(
                f"selective_scan_{backend} was called without boundary states, so it has no gradient; "
                "call mambascope.ops.selective_scan, or give boundaries ≥ 1"
            )
        args = (*inputs, h_boundary, *arriving_at_scan(inputs, dy, dh_last, dh_boundary))
        options = {"dt_softplus": ctx.dt_softplus, "boundaries": ctx.boundaries}
        return *scan_gradients(backend, args, options), None, None, None

    return setup, backward


def _conv_autograd(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dy: Any, dstate: Tensor | None) -> Any:
        x, weight, *others = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dstate = None if dstate is None else dstate.contiguous()
        flat = weight[:, 0] if weight.dim() == 3 else weight  # the eager twin takes a Conv1d's weight as it is
        args = (x, flat, *others, dy.contiguous(), dstate)
        dx, dweight, *more = _gradients(backend, "causal_conv_backward", CONV_GRADS, args, {"silu": ctx.silu})
        return dx, dweight if flat is weight or dweight is None else dweight[:, None], *more, None, None

    return setup, backward


def _save_all(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _softplus_backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return (grad * torch.sigmoid(x.to(grad.dtype))).to(x.dtype)


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


def _silu_backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    wide = compute_dtype(x)
    return (grad.to(wide) * _silu_slope(x.to(wide))).to(x.dtype)


def _gate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    y, z = ctx.saved_tensors
    wide = compute_dtype(y, z)
    grad, wide_z = grad.to(wide), z.to(wide)
    dy = grad * wide_z * torch.sigmoid(wide_z)
    return dy.to(y.dtype), (grad * y.to(wide) * _silu_slope(wide_z)).to(z.dtype)


def _norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ctx.eps, ctx.expose = inputs
    ctx.save_for_backward(x, weight)
    ctx.set_materialize_grads(False)


def _norm_autograd(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, dout: Tensor | None, dnormalized: Tensor | None, dscale: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors  # once: a checkpoint gives them a single time
        if not ctx.expose and weight is not None and dout is not None:
            kernel = norm_kernel(backend, x, weight, dout)
            if kernel is not None:
                dx, _, dweight = kernel(x, weight, dout, None, ctx.eps)
                return dx, dweight, None, None
        if not ctx.expose:  # whatever comes for the empty placeholders
            dnormalized = dscale = None
        dx, dweight = norm_gradients(x, weight, dout, ctx.eps, dnormalized, dscale)
        return dx.to(x.dtype), dweight, None, None

    return backward


def norm_kernel(backend: str, *tensors: Tensor) -> Any:
    """The backward kernel of the norm, where it may run: there is one, and nobody differentiates what it gives."""
    found = getattr(scan_module(backend), "norm_backward", None)
    if found is None or torch.is_grad_enabled() or not unwatched() or not plain(tensors) or not tensors[0].numel():
        return None
    return found


def norm_gradients(
    x: Tensor,
    weight: Tensor | None,
    dout: Tensor | None,
    eps: float,
    dnormalized: Tensor | None = None,
    dscale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Of x, in the compute dtype, and of the weight: from gradients at the norm's three outputs, by torch formulas."""
    wide = x.to(compute_dtype(x))
    scale = torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
    normalized = wide / scale
    through = torch.zeros_like(wide) if dnormalized is None else dnormalized  # gradient at x / scale
    dweight = None
    if dout is not None:
        dout = dout.to(wide.dtype)
        through = through + (dout if weight is None else dout * weight.to(wide.dtype))
        if weight is not None:
            dweight = (dout * normalized).flatten(0, -2).sum(0).to(weight.dtype)
    at_scale = -(through * normalized).sum(-1, keepdim=True) / scale
    if dscale is not None:
        at_scale = at_scale + dscale
    return through / scale + at_scale * normalized / x.shape[-1], dweight


def _refusing(operator: str, backend: str, what: str, way: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise BackendError(f"{operator} on backend {backend!r} has no {what}; {way}")

    return backward


def _register(backend: str, devices: str | Sequence[str], operators: Sequence[str]) -> None:
    bodies, fakes = Kernels(backend), Fakes()
    second = "use backend='torch' or 'reference' for second derivatives"
    formulas: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "selective_scan": _scan_autograd(backend),
        "causal_conv": _conv_autograd(backend),
        "softplus": (_save_all, _softplus_backward),
        "silu": (_save_all, _silu_backward),
        "gate": (_save_all, _gate_backward),
        "rms_norm": (_norm_setup, _norm_autograd(backend)),
        "state_window": (
            _nothing,
            _refusing("state_window", backend, "gradient", "use backend='torch' or 'reference'"),
        ),
    }
    for operator in ("selective_scan", "causal_conv"):
        refuse = _refusing(operator, backend, "second derivative", second)
        formulas[f"{operator}_backward"] = (_nothing, refuse)
    for operator in operators:
        name = f"mambascope::{operator}_{backend}"
        torch.library.define(name, SCHEMAS[operator])
        torch.library.impl(name, devices)(getattr(bodies, operator))
        torch.library.register_fake(name)(getattr(fakes, operator))
        setup, backward = formulas[operator]
        torch.library.register_autograd(name, backward, setup_context=setup)
        _functions[operator, backend] = _function(name, getattr(bodies, operator), setup, backward)


def _function(
    name: str, body: Callable[..., Any], setup: Callable[..., Any], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """An ordinary autograd function of an operator's parts."""

    def forward(ctx: Any, own: Callable[..., Any] | None, *inputs: Any) -> Any:
        output = (own or body)(*inputs)
        setup(ctx, inputs, output)
        return output

    def gradients(ctx: Any, *grads: Any) -> Any:
        found = backward(ctx, *grads)
        return (None, *found) if isinstance(found, tuple) else (None, found)

    parts = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    return type(name.replace("::", "_"), (torch.autograd.Function,), parts)


def _nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


for _backend, _devices in KERNEL_BACKENDS.items():
    _register(_backend, _devices, tuple(SCHEMAS))
# A compiler would unroll the chunked scan's loops into thousands of nodes: it gets one operator, on every device.
_register("torch", "default", ("selective_scan", "selective_scan_backward"))
