"""Path patching: what one part of the model tells another along chosen paths (Wang et al., 2211.00593, section 3;
Goldowsky-Dill et al., 2304.05969).

1. Run the source text; keep the sender's activation.
2. Run the base text with the sender's activation put in, every block's output frozen to what it is in the base run,
   except in the blocks that the paths may go through. Note what arrives at the receivers.
3. Run the base text with what arrived put into the receivers alone.

The residual stream is a sum, so at receivers on it (a block's input, the final stream) the difference that arrived is
added; several receivers then add up. At inner receivers (delta, B, C, u, z, skip) the value that arrived is put in.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mambascope.errors import HookError
from mambascope.hooks.interventions.base import Edit, Intervention, Target, kind
from mambascope.hooks.interventions.given import layers_of, sites_of
from mambascope.hooks.interventions.held import cached, match, origin_of
from mambascope.hooks.interventions.pairs import Pair, pair
from mambascope.hooks.interventions.values import patch
from mambascope.hooks.points import resolve_name, tail_of
from mambascope.hooks.positions import Site

__all__ = ["INPUTS", "path_patch"]

INPUTS = {
    "delta": "mixer.hook_delta",
    "B": "mixer.hook_B",
    "C": "mixer.hook_C",
    "u": "mixer.hook_u_write",
    "z": "mixer.hook_gate_in",
    "skip": "mixer.hook_u_skip",
}
"""A block's separate inputs, as ``"blocks.3.delta"``, and the points where they are received."""

_STREAM = ("hook_mixer_in", "hook_resid_pre", "hook_resid_post")
_AFTER = ("hook_mixer_out", "hook_resid_post")


@kind("add", overwrites=False)
def _place_add(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    def put(site: Site, held: Tensor) -> Edit:
        return lambda value, hook: value + match(held, value, hook, site.index, iv.options.get("length"), str(iv))

    return [(site, put(site, iv.tensors[f"value{i}"])) for i, site in enumerate(iv.sites)]


def path_patch(
    model: Any,
    base: Any,
    source: Any,
    sender: str | Site | Sequence[str | Site],
    receivers: str | Site | Sequence[str | Site],
    through: Sequence[int] | int = (),
) -> list[Intervention]:
    """The interventions that give ``base`` what ``sender`` says on ``source``, along paths to ``receivers`` only.

    ``base``, ``source``: prompts of equal token lengths, or a :class:`~mambascope.hooks.interventions.pairs.Pair`
    as ``base`` (its corrupted prompts get what the clean ones say; ``source=None``).
    ``sender``: ``"blocks.3"`` (what the block adds), ``"embed"``, or any site.
    ``receivers``: ``"blocks.7"`` (its input), ``"blocks.7.delta"`` (or B, C, u, z, skip), ``"final"`` (the stream
    before the last norm), or a site; positions restrict them: ``"blocks.7.B[9]"``.
    ``through``: the blocks that paths may go through; none means the direct path along the residual stream.

    Run them with ``model.run_with(base, …)``. Cost: three forward passes; held: ``B L …`` a receiver.

    Raises
    ------
    InputError: prompts of unequal token lengths (the rows are listed). HookError: a receiver that no path from the
        sender reaches.
    """
    prompts = base if isinstance(base, Pair) else pair(model, source, base)
    senders = [_part(model, s, _SENDERS) for s in sites_of(sender)]
    targets = [_part(model, r, _RECEIVERS) for r in sites_of(receivers)]
    none = isinstance(through, Sequence) and not isinstance(through, str) and not through
    middle = set() if none else set(layers_of("path_patch: through", through))
    count = model.cfg.n_layers
    if any(not 0 <= i < count for i in middle):
        raise HookError(f"through={sorted(middle)}: the model has blocks 0…{count - 1}")
    first = min(_place(s, count) for s in senders)
    for s in targets:
        if _place(s, count) <= first:
            raise HookError(f"receiver {s} lies before sender {senders[0]}: no path leads there")
    names = sorted({s.name for s in targets})
    own = {tail_of(s.name)[0] for s in senders}
    frozen = [i for i in range(count) if i not in middle and i not in own]
    outs = [f"blocks.{i}.hook_mixer_out" for i in frozen]
    # A sender inside a block: the block runs, but hears no other sender, unless paths may go through it.
    deaf = {tail_of(s.name)[0] for s in senders if tail_of(s.name)[1].startswith(("mixer.", "norm."))} - middle
    outs += [f"blocks.{i}.hook_mixer_in" for i in sorted(cast(set[int], deaf))]
    with torch.no_grad():
        _, donor = _run(model, prompts.clean, prompts.clean_mask, sorted({s.name for s in senders}))
        _, plain = _run(model, prompts.corrupted, prompts.corrupted_mask, [*names, *outs])
        edits = [patch(senders, donor)] + ([patch(outs, plain)] if outs else [])
        with model.intervene(edits):
            _, arrived = _run(model, prompts.corrupted, prompts.corrupted_mask, names)
    out = []
    for s in targets:
        if tail_of(s.name)[1] not in _STREAM:
            out.append(patch(s, arrived))
            continue
        change = cached(arrived, s.name, s.index) - cached(plain, s.name, s.index)
        out.append(Intervention("add", (s,), {}, {"value0": change}, source=origin_of(arrived, "path_patch")))
    return out


def _run(model: Any, tokens: Tensor, mask: Tensor | None, names: list[str]) -> Any:
    options: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    return model.run_with_cache(tokens, names_filter=names, return_type=None, **options)


_SENDERS = {"": "hook_mixer_out"}
_RECEIVERS = {"": "hook_mixer_in", **INPUTS}


def _part(model: Any, site: Site, parts: dict[str, str]) -> Site:
    """``blocks.3``, ``blocks.3.delta``, ``embed``, ``final`` or a hook point, as a site of the model."""
    name = site.name.strip()
    if name == "embed":
        return Site("hook_embed", site.index)
    if name == "final":
        return Site(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", site.index)
    words = name.split(".")
    if words[0] == "blocks" and len(words) in (2, 3):
        part = words[2] if len(words) == 3 else ""
        if part in parts:
            name = f"{words[0]}.{words[1]}.{parts[part]}"
    return Site(resolve_name(name, model.hook_dict), site.index)


def _place(site: Site, count: int) -> float:
    """Where a site stands: block i from i, its output at i + 0.5."""
    layer, tail = tail_of(site.name)
    if layer is None:
        return -1 if tail == "hook_embed" else count
    if tail == "hook_resid_pre":
        return layer - 0.25
    if tail == "hook_mixer_in":
        return layer
    return layer + (0.5 if tail in _AFTER else 0.25) + (0.25 if tail == "hook_resid_post" else 0)
