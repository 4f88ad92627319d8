"""TransformerLens' own helpers with Mamba's meaning: channels for neurons, states, hooks that fill a dict."""

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformer_lens.utilities.slice import Slice

from mambascope.errors import CacheError
from mambascope.hooks.points import scan_layers, spec_of
from mambascope.hooks.positions import Padding
from mambascope.hooks.recorder import select_names
from mambascope.memory import require_bytes

if TYPE_CHECKING:
    from mambascope.hooks.recorder import Recording

__all__ = ["LensMethods", "caching_hooks"]

_NO_HEADS = (
    "a Mamba block has no attention heads, so {} has nothing to work on (cache['result', layer] has an attention "
    "layer's); decompose_resid gives whole blocks, get_full_resid_decomposition(expand_neurons=True) and "
    "stack_neuron_results give inner channels"
)


class LensMethods:
    """What TransformerLens' ActivationCache offers for neurons, heads and state-space mixers; mixed into MambaCache.

    A "neuron" is an inner channel: it writes ``gated[d] * out_proj.weight[:, d]`` to the residual stream.
    """

    if TYPE_CHECKING:
        model: Any
        has_batch_dim: bool
        recording: Recording

        def __getitem__(self, key: Any) -> Any: ...
        def inner(self, layer: int) -> Tensor: ...
        def apply_ln_to_stack(self, residual_stack: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
        def _layer(self, layer: int | None) -> int: ...
        def _scale(self, layer: int, pos_slice: Any, batch_slice: Any) -> Tensor: ...

    # ---- neurons: inner channels

    def get_neuron_results(
        self, layer: int, neuron_slice: Any = None, pos_slice: Any = None, project_output_onto: Tensor | None = None
    ) -> Tensor:
        """What each inner channel of a block writes to the residual stream, ``(B) L D M``.

        ``project_output_onto`` (``M`` or ``M O``) is folded in first: ``(B) L D`` or ``(B) L D O``. With the
        out_proj bias, if there is one, the channels add up to ``hook_mixer_out``.
        """
        weight = self.model.blocks[layer].mixer.out_proj.weight.T  # D M
        acts = _as_slice(pos_slice).apply(self.inner(layer), dim=-2)
        channels = _as_slice(neuron_slice)
        acts, weight = channels.apply(acts, dim=-1), channels.apply(weight, dim=0).to(acts.device)
        through = weight if project_output_onto is None else weight @ project_output_onto.to(weight)
        if project_output_onto is not None and project_output_onto.ndim == 1:
            return acts * through
        need = acts.numel() * through.shape[-1] * acts.element_size()
        require_bytes(need, acts.device, f"block {layer}'s channel outputs", _WAY_OUT, CacheError)
        return acts[..., None] * through

    def stack_neuron_results(
        self,
        layer: int,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Any:
        """The channels of all blocks before ``layer``, one after the other: ``C (B) L M``, labels ``"L0N17"``.

        ``incl_remainder`` adds what the other channels, embedding and biases write, so that the stack adds up
        to the residual stream; ``apply_ln`` gives every term's share of the norm's output before ``layer``.
        """
        if mlp_input:
            raise CacheError("a Mamba block has no MLP: leave mlp_input out")
        layer, pos = self._layer(layer), _as_slice(pos_slice)
        channels = Slice.unwrap(neuron_slice)
        if channels.mode == "int":  # one channel, but still an axis of them
            channels = Slice([cast(int, channels.slice)])
        target = None if project_output_onto is None else project_output_onto.reshape(self.model.cfg.d_model, -1)
        stream = pos.apply(self["resid_pre", layer] if layer < self._layer(None) else self["resid_post", layer - 1], -2)
        if apply_ln:  # the norm's scale is the whole stream's, so its weight can go through the projection
            weight = self.model.norm_weight(layer).to(stream)
            target = weight[:, None] * (torch.eye(len(weight)).to(weight) if target is None else target.to(weight))
        parts = [self.get_neuron_results(i, channels, pos, target).movedim(-2, 0) for i in range(layer)]
        whole = stream if target is None else stream @ target.to(stream)
        stack = torch.cat(parts) if parts else whole.new_zeros(0, *whole.shape)
        width = [self.model.blocks[i].mixer.out_proj.weight.shape[1] for i in range(layer)]
        labels = [f"L{i}N{d}" for i in range(layer) for d in channels.apply(torch.arange(width[i]), dim=0).tolist()]
        if incl_remainder:
            stack = torch.cat([stack, (whole - stack.sum(0))[None]])
            labels.append("remainder")
        if apply_ln:
            stack = stack / self._scale(layer, pos, None)
        if project_output_onto is not None and project_output_onto.ndim == 1:
            stack = stack[..., 0]
        return (stack, labels) if return_labels else stack

    # ---- heads

    def compute_head_results(self) -> None:
        """Refused by name: a Mamba block has no heads; ``cache["result", layer]`` has an attention layer's."""
        raise CacheError(_NO_HEADS.format("compute_head_results"))

    def stack_head_results(self, *_: Any, **__: Any) -> Any:
        """Refused by name, as :meth:`compute_head_results`."""
        raise CacheError(_NO_HEADS.format("stack_head_results"))

    # ---- state-space mixers

    def ssm_layers(self, mixer_type: Any = None) -> list[int]:
        """The blocks whose mixer has a selective scan, or those whose mixer is a ``mixer_type``."""
        if mixer_type is None:
            return scan_layers(self.model.cfg, "ssm_layers")
        return [i for i, block in enumerate(self.model.blocks) if isinstance(block.mixer, mixer_type)]

    def compute_ssm_state(self, layer: int | None = None, time_step: int | None = None) -> Tensor:
        """The state after ``time_step``, ``(B) D N``, or after every step, ``(B) D L N`` (TransformerLens' order).

        Without ``layer`` all layers are stacked in front. Cost: O(D N) a step and layer, nothing quadratic.
        """
        if layer is None:
            return torch.stack([self.compute_ssm_state(i, time_step) for i in self.ssm_layers()])
        h = self["h", layer]
        if time_step is None:
            return h.full().transpose(-3, -2)
        return h[:, time_step] if self.has_batch_dim else h[time_step]

    def compute_ssm_effective_attention(
        self, layer: int | None = None, include_dt_scaling: bool = False, per_state_coord: bool = False
    ) -> Tensor:
        """M[c, t, s] = Σ_n C[t,n] · exp(A[c,n] Σ_{s<τ≤t} delta[τ,c]) · B[s,n], ``(B) D L L``, 0 for s > t.

        (Ali et al., 2403.01590.) ``include_dt_scaling`` multiplies column s by delta[s], so that
        y[t] = Σ_s M[t,s] u[s]; ``per_state_coord`` leaves the sum over n out, ``(B) D N L L``. Without ``layer`` all
        layers are stacked. This is the full map, O(D L²) numbers: the cache's ``effective_kernel`` and
        ``hidden_attention`` give rows and reductions in linear memory.
        """
        if layer is None:
            maps = [
                self.compute_ssm_effective_attention(i, include_dt_scaling, per_state_coord) for i in self.ssm_layers()
            ]
            return torch.stack(maps)
        delta, B, C = (self[n, layer] for n in ("delta", "B", "C"))
        delta, B, C = (v if self.has_batch_dim else v[None] for v in (delta, B, C))
        batch, length, width = delta.shape
        A = self.model.decay(layer).to(delta)  # D N
        states = B.shape[-1]
        need = delta.element_size() * batch * width * length * (length * (states if per_state_coord else 1) + states)
        way_out = "take a shorter text, or the cache's effective_kernel and hidden_attention"
        require_bytes(need, delta.device, f"the {length} x {length} maps of {width} channels", way_out, CacheError)
        written = B.to(delta).transpose(1, 2)[:, None].expand(batch, width, states, length)  # B D N S
        if include_dt_scaling:
            written = written * delta.transpose(1, 2)[:, :, None]
        padding = self.recording.padding
        if padding is not None:
            written = written * padding.mask[:, None, None].to(delta)  # nothing is read from padding
        kept, rows = torch.zeros_like(written), []  # what is left of each source: B D N S
        for t in range(length):
            kept = kept * torch.exp(A * delta[:, t, :, None])[..., None]
            kept[..., t] = written[..., t]
            read = kept * C[:, t, None, :, None].to(delta)  # B D N S
            rows.append(read if per_state_coord else read.sum(2))
        out = torch.stack(rows, -2)
        return out if self.has_batch_dim else out[0]


_WAY_OUT = "give project_output_onto=, fewer positions (pos_slice=) or fewer channels (neuron_slice=)"


def _as_slice(value: Any) -> Any:
    return value if isinstance(value, Slice) else Slice(value)


# ---- hooks that fill a dict


class _Saver:
    """Puts what passes one hook point into a dict, whole: the states of ``hook_h`` come step by step."""

    def __init__(self, cache: dict[str, Tensor], device: Any, no_batch: bool, pos_slice: Any) -> None:
        self.cache, self.device, self.no_batch, self.pos_slice = cache, device, no_batch, pos_slice
        self._states: dict[bool, Tensor] = {}
        self._call: tuple[int, Any, Padding | None] = (0, 0, None)  # length, start, padding of the last forward

    def __call__(self, value: Tensor, hook: Any, is_backward: bool = False) -> None:
        if spec_of(hook.name).stepwise:
            whole = self._step(value.detach(), hook, is_backward)
            if whole is None:
                return
        else:
            whole = value.detach()
        whole = whole.to(self.device)
        if self.no_batch and whole.shape[0] == 1:
            whole = whole[0]
        spec = spec_of(hook.name)
        axis = spec.axis - len(spec.shape.split())
        self.cache[hook.name + ("_grad" if is_backward else "")] = self.pos_slice.apply(whole, dim=axis)

    def _step(self, h: Tensor, hook: Any, is_backward: bool) -> Tensor | None:
        """Keep one step's h; all of them, ``B L D N``, at the last one of the pass."""
        if not is_backward:
            self._call = (hook.clock.length, hook.clock.start, hook.clock.padding)
        length, start, padding = self._call
        step = hook.pos - start
        step = int(step.reshape(-1)[0]) if isinstance(step, Tensor) else int(step)
        if is_backward not in self._states:
            need = h.numel() * length * h.element_size()
            require_bytes(need, h.device, f"all {length} states of {hook.name}", _FEWER, CacheError)
            self._states[is_backward] = h.new_zeros(h.shape[0], length, *h.shape[1:])
        states = self._states[is_backward]
        states[:, step] = h
        steps = length if padding is None else int(padding.lengths.max())
        if step != (0 if is_backward else steps - 1):
            return None
        del self._states[is_backward]
        if padding is None:
            return states
        states[:, steps:] = 0 if is_backward else states[:, steps - 1 : steps]
        columns = torch.arange(length, device=h.device) - padding.left[:, None]  # B L: token of each column
        inside = columns >= 0 if not is_backward else (columns >= 0) & (columns < padding.lengths[:, None])
        rows = torch.arange(h.shape[0], device=h.device)[:, None]
        return states[rows, columns.clamp_min(0)] * inside[..., None, None]


_FEWER = "name fewer points in names_filter, take a shorter text, or run_with_cache, which computes windows"


def caching_hooks(
    model: Any,
    names_filter: Any,
    incl_bwd: bool,
    device: Any,
    remove_batch_dim: bool,
    cache: dict[str, Tensor] | None,
    pos_slice: Any,
) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
    """TransformerLens' get_caching_hooks: ``(dict, forward hooks, backward hooks)``, every value whole.

    The four ``B L D N`` points are included where the filter lets them through, ``hook_h`` as one tensor of all its
    steps, which needs the memory for it. Nothing is added to the model.
    """
    cache = {} if cache is None else cache
    names = select_names(names_filter, list(model.hook_dict))
    savers = {n: _Saver(cache, device, remove_batch_dim, Slice.unwrap(pos_slice)) for n in names}
    forward = [(n, savers[n]) for n in names]
    backward = [(n, partial(savers[n], is_backward=True)) for n in names] if incl_bwd else []
    return cache, forward, backward
