"""Decompositions of the residual stream, for Mamba's blocks: what each block adds, down to its channels."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambascope.errors import CacheError
from mambascope.memory import require_bytes

if TYPE_CHECKING:
    from mambascope.hooks.recorder import Recording

__all__ = ["ResidualMethods"]


class ResidualMethods:
    """TransformerLens' residual-stream methods with Mamba's meaning: a block has one writer, its mixer.

    Norms carry a weight here (TransformerLens folds it into the next matrix), so :meth:`apply_ln_to_stack`
    multiplies by it: what comes out dotted with ``W_U`` is the logit.
    """

    if TYPE_CHECKING:
        model: Any
        has_batch_dim: bool
        recording: Recording

        def __getitem__(self, key: Any) -> Any: ...

    def _layer(self, layer: int | None) -> int:
        n = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n
        if not 0 <= layer <= n:
            raise CacheError(f"layer {layer} is outside the model's {n} blocks (0…{n})")
        return layer

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream entering ``layer`` (default: the unembedding) as a stack of its writers.

        Components: the embedding, then every earlier block's ``hook_mixer_out``, ``C B L M``; they add up to
        the stream. ``apply_ln`` gives their share of the norm's output, the norm's scale held.
        """
        from transformer_lens.utilities.slice import Slice

        if mlp_input or mode not in ("all", "attn"):
            raise CacheError("a Mamba block has no MLP: use mode='all' and mlp_input=False")
        layer = self._layer(layer)
        cut = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        labels = ["embed"] if incl_embeds else []
        parts = [self["hook_embed"]] if incl_embeds else []
        for i in range(layer):
            parts.append(self["mixer_out", i])
            labels.append(f"{i}_mixer_out")
        if not parts:
            raise CacheError(
                "nothing writes to the stream before layer 0 but the embedding, which incl_embeds=False leaves out"
            )
        dtype = max((p.dtype for p in parts), key=lambda d: torch.finfo(d).bits)
        stack = torch.stack([cut.apply(p.to(dtype), dim=-2) for p in parts])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=cut, has_batch_dim=self.has_batch_dim)
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """Embedding, every block's output, and the biases, ``C B L M``.

        ``expand_neurons`` splits a block's output into its inner channels (``gated[d] * W_out[:, d]``, labels
        ``"0c17"``) and the out_proj bias. That is D times larger; ``project_output_onto`` (``M`` or ``M O``)
        is folded in before the split, so a projection of all channels costs ``C B L O``.
        """
        layer = self._layer(layer)
        if not expand_neurons:
            stack, labels = self.decompose_resid(
                layer, mlp_input, apply_ln=apply_ln, pos_slice=pos_slice, return_labels=True
            )
            out = stack if project_output_onto is None else stack @ project_output_onto.to(stack.dtype)
            return (out, labels) if return_labels else out
        return self._channels(layer, mlp_input, apply_ln, pos_slice, return_labels, project_output_onto)

    def _channels(
        self, layer: int, mlp_input: bool, apply_ln: bool, pos_slice: Any, return_labels: bool, onto: Tensor | None
    ) -> Any:
        from transformer_lens.utilities.slice import Slice

        cut = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        embed = cut.apply(self["hook_embed"], dim=-2)  # (B) L M
        cfg, rows = self.model.cfg, embed.numel() // embed.shape[-1]
        width = cfg.d_model if onto is None else (1 if onto.ndim == 1 else onto.shape[1])
        inner = [self.model.blocks[i].mixer.out_proj.weight.shape[1] for i in range(layer)]
        need = 4 * sum(inner) * rows * width
        way_out = "give project_output_onto=, fewer positions (pos_slice=), or expand_neurons=False"
        require_bytes(need, embed.device, f"{sum(inner):,} channel outputs", way_out, CacheError)
        weight = self.model.norm_weight(layer).to(embed.device).float()
        target = torch.eye(cfg.d_model, device=embed.device) if onto is None else onto.float().reshape(cfg.d_model, -1)
        if apply_ln:
            target = target * weight[:, None]
        parts, labels = [], []
        for i in range(layer):
            gated = cut.apply(self.inner(i), dim=-2).float()  # (B) L D
            through = self.model.blocks[i].mixer.out_proj.weight.to(target).T @ target  # D O
            each = gated[..., None] * through  # (B) L D O
            parts.append(each.movedim(-2, 0))
            labels += [f"{i}c{d}" for d in range(inner[i])]
        parts.append((embed.float() @ target)[None])
        bias = self.model.accumulated_bias(layer).to(target) @ target
        parts.append(bias.expand_as(parts[-1]))
        stack = torch.cat(parts)
        if apply_ln:
            stack = stack / self._scale(layer, cut, None)
        if onto is not None and onto.ndim == 1:
            stack = stack[..., 0]
        return (stack, [*labels, "embed", "bias"]) if return_labels else stack

    def inner(self, layer: int) -> Tensor:
        """What a block's out_proj reads, ``(B) L *``: Mamba's gated channels, attention's heads laid side by side."""
        value = self[f"blocks.{layer}.{self.model.blocks[layer].mixer.inner}"]
        return value.flatten(-2) if value.ndim > 2 + self.has_batch_dim else value

    def _scale(self, layer: int, pos_slice: Any, batch_slice: Any) -> Tensor:
        name = "ln_final.hook_scale" if layer == self.model.cfg.n_layers else f"blocks.{layer}.norm.hook_scale"
        scale = self[name]  # (B) L 1
        scale = pos_slice.apply(scale, dim=-2)
        return scale if batch_slice is None or not self.has_batch_dim else batch_slice.apply(scale, dim=0)

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """What each component contributes to the norm's output before ``layer``: x * weight / scale.

        The scale is the cached one of the whole stream (so contributions add up); with ``recompute_ln`` each
        component is normalised by itself (the logit lens).
        """
        from transformer_lens.utilities.slice import Slice

        if mlp_input:
            raise CacheError("a Mamba block has no MLP: leave mlp_input out")
        layer = self._layer(layer)
        pos = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        rows = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        if has_batch_dim:
            residual_stack = rows.apply(residual_stack, dim=1)
        weight = self.model.norm_weight(layer).to(residual_stack)  # a cache may lie elsewhere than the model
        if recompute_ln:
            x = residual_stack.float()
            eps = self.model.cfg.norm_eps
            return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(residual_stack.dtype) * weight
        return residual_stack / self._scale(layer, pos, rows if has_batch_dim else None) * weight
