"""TransformerLens 4.3's public functions on our model: each row of docs/bridges.md's tables with its check.

``python -m tests.hooks.lens_rows`` writes the tables into docs/bridges.md; a test holds the two together, and another
that no public function of the three is missing here.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache, HookedRootModule, patching

import mambascope as ms
from mambascope.errors import CacheError, UnknownNameError
from mambascope.hooks.cache import MambaCache
from mambascope.model import HookedMamba
from tests.conftest import error

DOC = Path(__file__).resolve().parents[2] / "docs" / "bridges.md"


@dataclass
class Case:
    """A tiny model, a clean and a corrupted batch that differ in token 2, the clean run and its cache."""

    model: HookedMamba
    clean: Tensor
    corrupted: Tensor
    logits: Tensor
    cache: MambaCache

    def metric(self, logits: Tensor) -> Tensor:
        return logits[0, -1, 7] - logits[0, -1, 8]

    def patched(self, site: str, clean_name: str, t: int) -> Tensor:
        """The metric with one position of one activation restored by our own site."""
        value = self.cache[clean_name][:, t]
        return self.metric(self.model.run_with_hooks(self.corrupted, fwd_hooks=[(site, lambda v, hook: value)]))


@dataclass(frozen=True)
class Row:
    """One function: whether it works, what to know about it, and the check of both."""

    owner: str
    name: str
    works: bool
    note: str
    check: Callable[[Case], None]


ROWS: list[Row] = []


def row(owner: str, name: str, note: str = "", works: bool = True) -> Callable[[Any], Any]:
    def add(check: Callable[[Case], None]) -> Callable[[Case], None]:
        ROWS.append(Row(owner, name, works, note, check))
        return check

    return add


@contextmanager
def refused(kind: type[Exception], match: str) -> Iterator[None]:
    with pytest.raises(kind, match=match):
        yield


# ---- HookedRootModule

M = "HookedRootModule"


@row(M, "setup", "may be called again; the hook points keep the order in which they fire")
def _(case: Case) -> None:
    before = list(case.model.hook_dict)
    case.model.setup()
    assert list(case.model.hook_dict) == before
    assert torch.equal(case.model(case.clean), case.logits)


@row(M, "hook_points")
def _(case: Case) -> None:
    assert list(case.model.hook_points()) == list(case.model.hook_dict.values())


@row(
    M,
    "add_hook",
    "a name, a short name, a site with positions, or a function of names; one that matches nothing raises",
)
def _(case: Case) -> None:
    case.model.add_hook("blocks.1.mixer.hook_h[2]", lambda h, hook: h * 0)
    assert error(case.model(case.clean), case.logits) > 1e-4
    case.model.reset_hooks()
    assert torch.equal(case.model(case.clean), case.logits)


@row(M, "add_perma_hook", "stays through reset_hooks, goes with including_permanent=True")
def _(case: Case) -> None:
    case.model.add_perma_hook("delta1", lambda v, hook: v * 2)
    case.model.reset_hooks()
    assert error(case.model(case.clean), case.logits) > 1e-4
    case.model.reset_hooks(including_permanent=True)
    assert torch.equal(case.model(case.clean), case.logits)


@row(M, "check_and_add_hook")
def _(case: Case) -> None:
    point = case.model.hook_dict["blocks.0.mixer.hook_u"]
    case.model.check_and_add_hook(point, "blocks.0.mixer.hook_u", lambda v, hook: v * 0)
    assert error(case.model(case.clean), case.logits) > 1e-4
    case.model.reset_hooks()


@row(M, "check_hooks_to_add", "a subclass' check sees every hook of add_hook, hooks and run_with_hooks")
def _(case: Case) -> None:
    seen: list[str] = []
    case.model.check_hooks_to_add = lambda point, name, *a, **k: seen.append(name)  # type: ignore[method-assign]
    case.model.run_with_hooks(case.clean, fwd_hooks=[("delta1[2]", lambda v, hook: None)])
    assert seen == ["blocks.1.mixer.hook_delta"]
    del case.model.check_hooks_to_add


@row(M, "remove_all_hook_fns")
def _(case: Case) -> None:
    case.model.add_hook("delta1", lambda v, hook: v * 2)
    case.model.remove_all_hook_fns()
    assert torch.equal(case.model(case.clean), case.logits)


@row(M, "reset_hooks")
def _(case: Case) -> None:
    case.model.hook_dict["hook_embed"].ctx["note"] = 1
    case.model.add_hook("delta1", lambda v, hook: v * 2)
    case.model.reset_hooks()
    assert case.model.hook_dict["hook_embed"].ctx == {}
    assert torch.equal(case.model(case.clean), case.logits)


@row(M, "clear_contexts")
def _(case: Case) -> None:
    case.model.hook_dict["hook_embed"].ctx["note"] = 1
    case.model.clear_contexts()
    assert case.model.hook_dict["hook_embed"].ctx == {}


@row(M, "list_hooks", "short names are understood; a name that matches nothing raises")
def _(case: Case) -> None:
    case.model.add_hook("delta1", print)
    found = case.model.list_hooks("delta1")
    assert [h.user_hook for h in found["blocks.1.mixer.hook_delta"]] == [print]
    with refused(UnknownNameError, "no hook point is called"):
        case.model.list_hooks("blocks.9.nothing")
    case.model.reset_hooks()


@row(M, "hooks", "nests; hooks are gone afterwards, also after an exception")
def _(case: Case) -> None:
    with case.model.hooks(fwd_hooks=[("delta1", lambda v, hook: v * 2)]):
        with case.model.hooks(fwd_hooks=[("delta0", lambda v, hook: v * 2)]):
            both = case.model(case.clean)
        one = case.model(case.clean)
    assert error(both, one) > 1e-5
    assert error(one, case.logits) > 1e-5
    assert torch.equal(case.model(case.clean), case.logits)


@row(M, "run_with_hooks", "a hook that the run never reaches raises")
def _(case: Case) -> None:
    out = case.model.run_with_hooks(case.clean, return_type="loss", fwd_hooks=[("delta1", lambda v, hook: v * 2)])
    assert out.ndim == 0


@row(M, "run_with_cache", "stores little, reads everything (docs/contract.md)")
def _(case: Case) -> None:
    _, cache = case.model.run_with_cache(case.clean, names_filter=["blocks.1.mixer.hook_delta"], pos_slice=-1)
    assert list(cache) == ["blocks.1.mixer.hook_delta"]
    assert torch.equal(cache["delta", 1], case.cache["delta", 1][:, -1:])


@row(M, "get_caching_hooks", "`hook_h`, called step by step, is put together to B L D N, gradients too")
def _(case: Case) -> None:
    with torch.enable_grad():
        cache, forward, backward = case.model.get_caching_hooks(incl_bwd=True, pos_slice=slice(1, 4))
        case.model.run_with_hooks(case.clean, return_type="loss", fwd_hooks=forward, bwd_hooks=backward).backward()
    assert set(cache) == {*case.model.hook_dict, *(f"{n}_grad" for n in case.model.hook_dict)}
    for name in case.model.hook_dict:
        assert error(cache[name], case.cache[name][:, 1:4]) < 2e-6, name
        assert cache[f"{name}_grad"].shape == cache[name].shape
        assert cache[f"{name}_grad"].abs().max() > 0
    case.model.zero_grad()


@row(M, "add_caching_hooks")
def _(case: Case) -> None:
    cache = case.model.add_caching_hooks(["h1", "delta1"])
    case.model(case.clean)
    case.model.reset_hooks()
    assert error(cache["blocks.1.mixer.hook_h"], case.cache["h", 1].full()) < 2e-6
    assert torch.equal(cache["blocks.1.mixer.hook_delta"], case.cache["delta", 1])


@row(M, "cache_all", "deprecated there")
def _(case: Case) -> None:
    cache: dict[str, Tensor] = {}
    case.model.cache_all(cache)
    case.model(case.clean)
    case.model.reset_hooks()
    assert set(cache) == set(case.model.hook_dict)


@row(M, "cache_some", "deprecated there")
def _(case: Case) -> None:
    cache: dict[str, Tensor] = {}
    case.model.cache_some(cache, lambda name: name.endswith("hook_u"))
    case.model(case.clean)
    case.model.reset_hooks()
    assert torch.equal(cache["blocks.1.mixer.hook_u"], case.cache["u", 1])


# ---- ActivationCache

C = "ActivationCache"


@row(C, "keys")
@row(C, "values", "computed as they are reached")
@row(C, "items", "computed as they are reached")
def _(case: Case) -> None:
    names = list(case.cache.keys())
    assert names == list(case.model.hook_dict) == [name for name, _ in case.cache.items()]
    assert len(list(case.cache.values())) == len(names) == len(case.cache)


@row(C, "to")
def _(case: Case) -> None:
    assert case.cache.to("cpu") is case.cache


@row(C, "toggle_autodiff", "global state of torch, as there")
def _(case: Case) -> None:
    before = torch.is_grad_enabled()
    case.cache.toggle_autodiff(not before)
    now = torch.is_grad_enabled()
    torch.set_grad_enabled(before)
    assert now is not before


@row(C, "remove_batch_dim", "a batch of several rows raises CacheError")
def _(case: Case) -> None:
    _, one = case.model.run_with_cache(case.clean[:1])
    assert one.remove_batch_dim()["h", 1][2:4].shape == (2, *case.cache["h", 1].shape[2:])


@row(C, "apply_slice_to_batch_dim")
def _(case: Case) -> None:
    assert error(case.cache.apply_slice_to_batch_dim([1])["delta", 1], case.cache["delta", 1][1:]) < 1e-6


@row(C, "accumulated_resid", "without incl_mid: a block has no middle")
def _(case: Case) -> None:
    stack, labels = case.cache.accumulated_resid(apply_ln=True, return_labels=True)
    assert labels[-1] == "final_post"
    assert error(stack[-1] @ case.model.W_U, case.logits) < 1e-5
    with refused(UnknownNameError, "hook_resid_mid"):
        case.cache.accumulated_resid(incl_mid=True)


@row(C, "logit_lens", "its last entry is the model's logits")
def _(case: Case) -> None:
    lens = case.cache.logit_lens(positions=None)
    assert error(lens.values[-1], case.logits) < 1e-5
    assert error(lens.values[0], case.logits) > 1e-2
    ranks = case.cache.logit_lens(targets=case.clean[:, -1]).rank_trajectory()
    assert ranks.shape == (case.model.cfg.n_layers + 1, 2)


@row(C, "decompose_resid", "components: the embedding and every block's mixer_out")
def _(case: Case) -> None:
    stack, labels = case.cache.decompose_resid(apply_ln=True, return_labels=True)
    assert labels == ["embed", *(f"{i}_mixer_out" for i in range(case.model.cfg.n_layers))]
    assert error(stack.sum(0) @ case.model.W_U, case.logits) < 1e-5


@row(C, "get_full_resid_decomposition", "whole blocks; expand_neurons=True splits them into inner channels")
def _(case: Case) -> None:
    for expand in (False, True):
        stack = case.cache.get_full_resid_decomposition(expand_neurons=expand, apply_ln=True)
        assert error(stack.sum(0) @ case.model.W_U, case.logits) < 1e-5


@row(C, "logit_attrs", "components add up to the logit")
def _(case: Case) -> None:
    parts = case.cache.logit_attrs(case.cache.decompose_resid(), case.clean, incorrect_tokens=case.corrupted.roll(1))
    first, second = (case.logits.gather(-1, t[..., None])[..., 0] for t in (case.clean, case.corrupted.roll(1)))
    assert error(parts.sum(0), first - second) < 1e-5


@row(C, "apply_ln_to_stack", "multiplies by the norm's weight, which is not folded into W_U here")
def _(case: Case) -> None:
    stack = case.cache.apply_ln_to_stack(case.cache["resid_post", -1][None])
    assert error(stack[0] @ case.model.W_U, case.logits) < 1e-5


@row(C, "stack_activation", "any name; the B L D N ones in full")
def _(case: Case) -> None:
    assert torch.equal(case.cache.stack_activation("delta")[1], case.cache["delta", 1])
    assert torch.equal(case.cache.stack_activation("h")[1], case.cache["h", 1].full())


@row(C, "get_neuron_results", "a neuron is an inner channel: gated[d] · out_proj.weight[:, d]")
def _(case: Case) -> None:
    parts = case.cache.get_neuron_results(1)
    assert error(parts.sum(-2), case.cache["mixer_out", 1]) < 1e-5
    direction = case.model.W_U[:, 5]
    assert error(case.cache.get_neuron_results(1, [3, 4], -1, direction), parts[:, -1, 3:5] @ direction) < 1e-5


@row(C, "stack_neuron_results", "inner channels of all blocks; with incl_remainder they add up to the stream")
def _(case: Case) -> None:
    n, direction = case.model.cfg.n_layers, case.model.W_U[:, 5]
    for layer in (1, n):
        stack, labels = case.cache.stack_neuron_results(layer, incl_remainder=True, return_labels=True)
        assert error(stack.sum(0), case.cache["resid_post", layer - 1]) < 1e-5
        assert labels[3] == "L0N3" and labels[-1] == "remainder"
    some = case.cache.stack_neuron_results(
        -1, neuron_slice=[2], incl_remainder=True, apply_ln=True, project_output_onto=direction
    )
    assert some.shape == (n + 1, *case.clean.shape)
    assert error(some.sum(0), case.logits[..., 5]) < 1e-5


@row(C, "compute_head_results", "no heads", works=False)
def _(case: Case) -> None:
    with refused(CacheError, "no attention heads"):
        case.cache.compute_head_results()


@row(C, "stack_head_results", "no heads", works=False)
def _(case: Case) -> None:
    with refused(CacheError, "stack_neuron_results give inner channels"):
        case.cache.stack_head_results()


@row(C, "ssm_layers")
def _(case: Case) -> None:
    from mambascope.model.mixer import MambaMixer

    assert case.cache.ssm_layers() == case.cache.ssm_layers(MambaMixer) == list(range(case.model.cfg.n_layers))
    assert case.cache.ssm_layers(torch.nn.Linear) == []


@row(C, "compute_ssm_state", "O(D N) a step; there O(D N L²)")
def _(case: Case) -> None:
    whole = case.cache.compute_ssm_state()
    assert error(whole[1].transpose(-3, -2), case.cache["h", 1].full()) < 1e-6
    assert error(case.cache.compute_ssm_state(1, 3), whole[1, :, :, 3]) < 1e-6


@row(C, "compute_ssm_effective_attention", "the whole B D L L map; `hidden_attention` takes linear memory")
def _(case: Case) -> None:
    maps = case.cache.compute_ssm_effective_attention(include_dt_scaling=True)
    for layer in range(case.model.cfg.n_layers):
        y = torch.einsum("bdts,bsd->btd", maps[layer], case.cache["u_write", layer])
        assert error(y, case.cache["y", layer]) < 1e-5
    split = case.cache.compute_ssm_effective_attention(1, per_state_coord=True)
    assert error(split.sum(2), case.cache.compute_ssm_effective_attention(1)) < 1e-5


# ---- patching

P = "patching"


@row(P, "generic_activation_patch", "any name with a position axis; `h` is a recurrence and is patched by site")
def _(case: Case) -> None:
    patch, setter = patching.generic_activation_patch, patching.layer_pos_patch_setter
    for name in ("delta", "mixer_out", "A_bar"):
        out = patch(case.model, case.corrupted, case.cache, case.metric, setter, name, ("layer", "pos"))
        full = name if name == "mixer_out" else f"mixer.hook_{name}"
        site = f"blocks.1.{full}[2]" if name != "mixer_out" else "blocks.1.hook_mixer_out[2]"
        assert error(out[1, 2], case.patched(site, f"{name}1", 2)) < 1e-5
    result = patch(
        case.model,
        case.corrupted,
        case.cache,
        lambda logits: logits[:, -1, 7],
        setter,
        "delta",
        ("layer", "pos"),
        reduce="none",
        baseline=True,
    )
    assert result.effect().shape == (case.model.cfg.n_layers, case.clean.shape[1], 2)
    with refused(RuntimeError, "."):
        patch(case.model, case.corrupted, case.cache, case.metric, setter, "h", ("layer", "pos"))


@row(P, "make_df_from_ranges")
def _(case: Case) -> None:
    assert len(patching.make_df_from_ranges([2, 3], ["layer", "pos"])) == 6


@row(P, "layer_pos_patch_setter", "patches one position of B L … activations")
def _(case: Case) -> None:
    value = patching.layer_pos_patch_setter(torch.zeros(1, 3, 2), [0, 1], torch.ones(1, 3, 2))
    assert value.sum() == 2


def _patches(name: str, site: str, clean: str) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        out = getattr(patching, name)(case.model, case.corrupted, case.cache, case.metric)
        assert out.shape == (case.model.cfg.n_layers, case.clean.shape[1])
        assert error(out[0, 2], case.patched(f"blocks.0.{site}[2]", clean, 2)) < 1e-5
        assert error(out[0, 2], case.metric(case.model(case.corrupted))) > 1e-4

    return check


row(P, "get_act_patch_resid_pre")(_patches("get_act_patch_resid_pre", "hook_resid_pre", "resid_pre0"))
row(P, "get_act_patch_attn_out", "attn_out means mixer_out, the block's one writer")(
    _patches("get_act_patch_attn_out", "hook_mixer_out", "mixer_out0")
)


def _unknown(name: str) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        with refused(UnknownNameError, "no hook point is called"):
            getattr(patching, name)(case.model, case.corrupted, case.cache, case.metric)

    return check


for _name in ("resid_mid", "mlp_out", "block_every"):
    row(P, f"get_act_patch_{_name}", "no MLP, so nothing between mixer and residual", works=False)(
        _unknown(f"get_act_patch_{_name}")
    )
for _name in sorted(n for n in vars(patching) if n.startswith("get_act_patch_attn_head")):
    row(P, _name, "no heads", works=False)(_unknown(_name))


@row(
    P,
    "get_act_patch_direct_path",
    "no heads; `ms.interventions.path_patch` follows paths between blocks and what they read",
    works=False,
)
def _(case: Case) -> None:
    with refused(ValueError, "has no `attn` component"):
        patching.get_act_patch_direct_path(
            case.model, case.corrupted, case.cache, case.cache, case.metric, src_layer=0, src_head=0
        )


@row(P, "get_act_patch_direct_path_all_sources", "no heads", works=False)
def _(case: Case) -> None:
    with refused(ValueError, "has no `attn` component"):
        patching.get_act_patch_direct_path_all_sources(case.model, case.corrupted, case.cache, case.cache, case.metric)


def _channels(name: str, columns: list[str], cell: list[int]) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        setter, where = getattr(patching, name), pd.DataFrame([cell], columns=columns)
        out = patching.generic_activation_patch(
            case.model, case.corrupted, case.cache, case.metric, setter, "gated", index_df=where
        )

        def channel(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            index = (slice(None), *(cell[1:2] if len(cell) == 3 else [slice(None)]), cell[-1])
            value[index] = case.cache["gated", 0][index]
            return value

        by_hand = case.model.run_with_hooks(case.corrupted, fwd_hooks=[("gated0", channel)])
        assert error(out[0], case.metric(by_hand)) < 1e-5
        assert error(out[0], case.metric(case.model(case.corrupted))) > 1e-6

    return check


_CHANNEL = "on our B L D activations its head is a channel: name channels in index_df"
row(P, "layer_head_vector_patch_setter", _CHANNEL)(
    _channels("layer_head_vector_patch_setter", ["layer", "head"], [0, 5])
)
row(P, "layer_pos_head_vector_patch_setter", _CHANNEL)(
    _channels("layer_pos_head_vector_patch_setter", ["layer", "pos", "head"], [0, 2, 5])
)


def _pattern_setter(name: str, index: list[int]) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        with refused(IndexError, "too many indices"):
            getattr(patching, name)(case.cache["delta", 0], index, case.cache["delta", 0])

    return check


for _name, _index in (
    ("layer_head_pattern_patch_setter", [0, 0]),
    ("layer_head_pos_pattern_patch_setter", [0, 0, 0]),
    ("layer_head_dest_src_pos_pattern_patch_setter", [0, 0, 0, 0]),
):
    row(P, _name, "made for attention patterns", works=False)(_pattern_setter(_name, _index))


# ---- a few of transformer_lens.tools.analysis; imported late, for it brings Triton in before tests choose how it runs

T = "tools.analysis"


@row(T, "logit_lens")
def _(case: Case) -> None:
    from transformer_lens.tools import analysis

    lens = analysis.logit_lens(case.model, case.clean, positions=None)
    assert error(lens.values[-1], case.logits) < 1e-5


@row(T, "logit_readout")
def _(case: Case) -> None:
    from transformer_lens.tools import analysis

    read = analysis.logit_readout(case.model, case.cache["resid_post", -1], top_k=3)
    assert torch.equal(read.top_ids, case.logits.topk(3).indices)


@row(T, "attribution_patching.cache_activation_and_gradient", "name the points: its default names heads")
def _(case: Case) -> None:
    from transformer_lens.tools.analysis import attribution_patching

    with torch.enable_grad():
        found = attribution_patching.cache_activation_and_gradient(
            case.model, case.corrupted, case.metric, ["blocks.1.mixer.hook_delta", "blocks.1.hook_mixer_out"]
        )
    difference = case.cache["mixer_out", 1] - found.activations["blocks.1.hook_mixer_out"]
    step = 1e-3
    moved = case.model.run_with_hooks(case.corrupted, fwd_hooks=[("mixer_out1", lambda v, hook: v + step * difference)])
    predicted = step * (difference * found.gradients["blocks.1.hook_mixer_out"]).sum()  # type: ignore[operator]
    assert error(predicted, case.metric(moved) - found.metric) < 0.05


@row(
    T,
    "attribution_patching.attribution_patch",
    "its nodes are heads and MLPs; `ms.attribute` predicts every patch at our sites, states too",
    works=False,
)
def _(case: Case) -> None:
    from transformer_lens.tools.analysis import attribution_patching

    with torch.enable_grad(), refused(ValueError, "."):
        attribution_patching.attribution_patch(case.model, case.clean, case.corrupted, case.metric)
    pair = (case.model, case.clean[:1], case.corrupted[:1], case.metric, ["mixer_out", "h"])
    assert ms.attribute(*pair).values.shape == ms.sweep(*pair, progress=False).values.shape


# ---- the tables


def public(owner: str) -> list[str]:
    """The names that ``owner``'s table must have, in TransformerLens' own order."""
    if owner == "patching":
        own = [n for n, f in vars(patching).items() if inspect.isfunction(f) and f.__module__ == patching.__name__]
        made = [n for n in vars(patching) if n.startswith("get_act_patch")]
        return [n for n in dict.fromkeys([*own, *made]) if not n.startswith("_")]
    cls = {"HookedRootModule": HookedRootModule, "ActivationCache": ActivationCache}[owner]
    names = [n for base in cls.__mro__ if base.__module__.startswith("transformer_lens") for n in vars(base)]
    return [n for n in names if not n.startswith("_") and callable(getattr(cls, n))]


def table(owner: str) -> str:
    """One table in Markdown."""
    lines = [f"| `{owner}.` | works | |", "|---|---|---|"]
    lines += [f"| {r.name} | {'yes' if r.works else 'no'} | {r.note} |" for r in ROWS if r.owner == owner]
    return "\n".join(lines)


def filled(text: str) -> str:
    """``text`` with the tables between their markers written anew."""
    for owner in dict.fromkeys(r.owner for r in ROWS):
        begin, end = f"<!-- {owner} -->", f"<!-- end {owner} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(owner)}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    DOC.write_text(filled(DOC.read_text(encoding="utf-8")), encoding="utf-8")
