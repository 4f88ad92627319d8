"""Relevance: conserved layer by layer, what autograd says of the model with its gates held, and what happens."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_built import random_model
from test_analysis_contributions import biased
from torch import Tensor
from torch.nn import functional as F

from mambascope.analyses import logit_contributions, read, repeated_tokens, token_relevance
from mambascope.analyses.tasks.induction import InductionHeads
from mambascope.errors import CacheError, InputError
from mambascope.loading import load
from mambascope.model import HookedMamba

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def by_autograd(
    model: HookedMamba, ids: Tensor, direction: Tensor, query: int, rule: str
) -> tuple[Tensor, list[Tensor]]:
    """The model step by step in float64 with everything held detached: resid · gradient at every depth."""
    act = ACTIVATIONS[model.cfg.activation]

    def held(x: Tensor) -> Tensor:
        return x * (act(x) / x).detach()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + model.cfg.norm_eps).sqrt().detach() * weight

    model = model.double()
    r = model.embed(ids[0]).detach().requires_grad_()
    streams = [r]
    for block in model.blocks:
        m, D, N = block.mixer, model.cfg.d_inner, model.cfg.d_state
        x, z = m.in_proj(norm(r, block.norm.weight)).split(D, -1)
        padded = F.pad(x.T, (model.cfg.d_conv - 1, 0))[None]
        u = held(F.conv1d(padded, m.conv1d.weight, m.conv1d.bias, groups=D)[0].T)
        low, B, C = m.x_proj(u).detach().split([model.cfg.dt_rank, N, N], -1)
        delta = F.softplus(m.dt_proj(low)).detach()
        h, ys = torch.zeros(D, N, dtype=torch.float64), []
        for t in range(len(u)):
            h = torch.exp(delta[t][:, None] * m.decay()) * h + delta[t][:, None] * B[t] * u[t][:, None]
            ys.append((h * C[t]).sum(1))
        total, gate = torch.stack(ys) + m.D * u, held(z)
        if rule == "frozen":
            gated = total * gate.detach()
        else:
            gated = 0.5 * (total * gate.detach() + total.detach() * gate)
        r = r + m.out_proj(gated)
        streams.append(r)
    gradients = torch.autograd.grad(r[query] @ direction.double(), streams)
    return [(g * s).sum(-1).detach() for g, s in zip(gradients, streams, strict=True)]


@pytest.mark.parametrize("rule", ["half", "frozen"])
@pytest.mark.parametrize(("N", "activation"), [(1, "silu"), (7, "silu"), (16, "silu"), (5, "gelu"), (5, "relu")])
def test_relevance_is_the_gradient_through_held_gates(rule: Any, N: int, activation: str, ids: Tensor) -> None:
    model = biased(N, d_state=N, activation=activation)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(N))
    found = token_relevance(model, ids[:, :33], direction=direction, query=25, rule=rule)
    rows = by_autograd(model, ids[:, :33], direction, 25, rule)
    for i, row in enumerate(rows):
        assert torch.allclose(found.stream[i], row[:26], rtol=1e-4, atol=1e-4 * float(row.abs().max()))
        assert not row[26:].any()  # causal
    other = token_relevance(
        model, ids[:, :33], direction=direction, query=25, rule="half" if rule == "frozen" else "frozen"
    )
    assert not torch.allclose(found.stream[0], other.stream[0], rtol=1e-2)  # the rules do differ


@pytest.mark.parametrize("rule", ["half", "frozen"])
@pytest.mark.parametrize(
    "options", [{}, {"mixer_norm_eps": 1e-6}, {"d_conv": 1}, {"conv_bias": False}, {"d_state": 16}]
)
def test_relevance_is_conserved(rule: Any, options: dict[str, Any], ids: Tensor) -> None:
    model = biased(3, **options)
    with torch.no_grad():
        _, state = model(ids, return_state=True)
        logits, cache = model.run_with_cache(ids[:, :41], state=state)
    for query in (0, 20, -1):
        found = token_relevance(model, cache, answer=3, wrong=5, query=query, rule=rule)
        target = float(logits[0, query, 3] - logits[0, query, 5])
        assert float(found.defect.max()) < 1e-5  # asked for: 1e-3
        assert float(found.stream[-1].sum()) == pytest.approx(target, abs=1e-5)
        assert not found.stream[-1][:-1].any()  # the last row is all at the query
        whole = float(found.tokens.sum() + found.bias.sum() + found.carry.sum())
        assert whole == pytest.approx(target, abs=1e-4)
        assert float(found.carry.abs().max()) > 1e-6
        rest = torch.cat([found.carry.flip(0).cumsum(0).flip(0), torch.zeros(1)])
        assert torch.allclose(found.absorbed.sum(1) + rest, torch.full((4,), target, dtype=torch.float64), atol=1e-4)


def test_a_wrong_gradient_is_not_conserved(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting the conv's memory breaks the sum: the check can fail."""
    from mambascope.analyses.relevance_block import FrozenBlock

    monkeypatch.setattr(FrozenBlock, "conv_adjoint", lambda self, g: g * self.taps[:, -1])
    assert float(token_relevance(biased(3), ids, answer=3, wrong=5).defect.max()) > 1e-3


def test_by_intervention_under_held_gates(ids: Tensor) -> None:
    """Scale one token's embedding with all gates held: the logit changes by its relevance."""
    model = biased(4)
    text = ids[:, :30]
    logits, cache = model.run_with_cache(text)
    found = token_relevance(model, cache, answer=3, wrong=5, rule="frozen")
    clean = float((logits[0, -1, 3] - logits[0, -1, 5]).detach())
    hooks: list[Any] = [("ln_final.hook_scale", hold(cache["ln_final.hook_scale"]))]
    for i in range(3):
        hooks.append((f"blocks.{i}.norm.hook_scale", hold(cache["scale", i])))
        hooks += [(f"blocks.{i}.mixer.hook_{n}", hold(cache[n, i])) for n in ("gate_in", "delta", "B", "C")]
        seen: dict[str, Tensor] = {}
        factor = torch.sigmoid(cache["conv", i])
        hooks.append((f"blocks.{i}.mixer.hook_conv", lambda v, hook, seen=seen: seen.update(conv=v)))
        hooks.append((f"blocks.{i}.mixer.hook_u", lambda v, hook, seen=seen, f=factor: seen["conv"] * f))
    changes = []
    for s in (0, 11, 28, 29):
        scale = (f"hook_embed[{s}]", lambda v, hook: 1.5 * v)
        now = model.run_with_hooks(text, fwd_hooks=[scale, *hooks]).detach()[0, -1]
        changes.append(float(now[3] - now[5]) - clean)
        assert changes[-1] == pytest.approx(0.5 * float(found.tokens[s]), abs=2e-5)
    assert max(map(abs, changes)) > 1e-2
    free = model.run_with_hooks(text, fwd_hooks=[scale]).detach()[0, -1]  # gates free: not the same
    assert abs(float(free[3] - free[5]) - clean - 0.5 * float(found.tokens[29])) > 1e-3


def hold(value: Tensor) -> Callable[..., Tensor]:
    return lambda now, hook: value.clone()


def hits(model: HookedMamba, rows: Tensor, rule: Any, shuffle: bool = False) -> float:
    """How often the token with the largest relevance to the right answer is the one that holds it."""
    n, found = rows.shape[1] // 2, []
    for row in rows:
        for t in range(n, 2 * n - 1):
            answer = int(row[t + 1] if not shuffle else row[n + (t + 1 + n // 2) % n])
            tokens = token_relevance(model, row, answer=answer, query=t, rule=rule).tokens
            found.append(int(tokens.argmax()) == row[:n].tolist().index(int(row[t + 1])))
    return sum(found) / len(found)


@pytest.mark.parametrize("rule", ["half", "frozen"])
def test_recall_is_traced_to_its_source_and_chance_is_chance(recall, rule: Any) -> None:
    rows = repeated_tokens(recall, 8, 2, seed=2)
    assert hits(recall, rows, rule) == 1.0
    assert hits(recall, rows, rule, shuffle=True) == 0.0
    untrained = [hits(random_model(seed, d_vocab=20), rows, rule) for seed in range(4)]
    assert sum(untrained) / 4 < 0.25  # 1 in 12 by chance


def offsets(model: HookedMamba, scores: Callable[[Tensor, int], Tensor]) -> list[int]:
    """Of twelve rows of the induction heads task: where the largest score lies, counted from the target."""
    sample = InductionHeads().sample(3, 12, 64)
    found = []
    for row, answer in zip(sample.tokens, sample.targets[:, -1].tolist(), strict=True):
        target = int((row == 15).nonzero()[0]) + 1  # what followed the special token
        found.append(int(scores(row, answer)[:-1].argmax()) - target)
    return found


def test_what_a_trained_model_recalls_is_traced_to_the_token_itself() -> None:
    """The scan reads its induction layer two steps after the target, where the conv put it; relevance goes further."""
    trained = load("induction-2l", device="cpu")

    def direct(row: Tensor, answer: int) -> Tensor:
        return logit_contributions(model, row, answer=answer).by_token

    def half(row: Tensor, answer: int) -> Tensor:
        return token_relevance(model, row, answer=answer).tokens

    def frozen(row: Tensor, answer: int) -> Tensor:
        return token_relevance(model, row, answer=answer, rule="frozen").tokens

    model = trained
    assert offsets(model, direct) == [2] * 12
    assert offsets(model, half) == [0] * 12
    assert set(offsets(model, frozen)) == {-1, 0}  # the special token before it, or itself
    torch.manual_seed(0)
    model = HookedMamba(trained.cfg)
    for scores in (direct, half, frozen):
        assert sum(abs(o) <= 2 for o in offsets(model, scores)) <= 4  # 12 · 5/62 = 1 expected


def test_one_layer_is_direct(recall) -> None:
    """With one layer and no bias, relevance under the frozen gate is the direct contribution through the conv."""
    row = repeated_tokens(recall, 8, 1, seed=2)[0]
    direct = logit_contributions(recall, row, query=12)
    traced = token_relevance(recall, row, query=12, rule="frozen")
    source = int(direct.by_token.argmax())
    assert float(traced.tokens[source]) == pytest.approx(float(direct.by_token[source]), rel=1e-3)


def test_one_token_and_tables(random, speaking) -> None:
    found = token_relevance(random, [3], answer=1)
    assert found.stream.shape == (4, 1)
    assert float(found.defect.max()) < 1e-5
    found = token_relevance(speaking, "abcabc")
    assert list(found.table().columns) == ["position", "token", "relevance", "after 0", "after 1", "after 2"]
    layers = found.by_layer()
    assert layers["leaving"][2] == pytest.approx(found.target.value, rel=1e-4)
    assert layers["entering"][1] == layers["leaving"][0]
    figure = found.figure()
    assert figure.data[0].z.shape == (4, 6)
    assert list(figure.layout.yaxis.ticktext) == ["embed", "0", "1", "2"]
    assert "half gate" in figure.layout.title.text


SITES = [
    "hook_mixer_in", "norm.hook_normalized", "mixer.hook_x", "mixer.hook_gate_in", "mixer.hook_conv", "mixer.hook_u",
    "mixer.hook_u_write", "mixer.hook_u_skip", "mixer.hook_skip", "mixer.hook_gated", "hook_mixer_out",
    "hook_resid_post",
]  # fmt: skip


@pytest.mark.parametrize("site", SITES)
def test_edits_are_refused_by_name(random, ids: Tensor, site: str) -> None:
    with random.hooks(fwd_hooks=[(f"blocks.1.{site}[40]", lambda v, hook: v + 0.5 * v.abs().max())]):
        _, cache = random.run_with_cache(ids)
    with pytest.raises(CacheError, match=rf"layer 1: a hook edited {site} at position 40, "):
        token_relevance(random, cache, answer=3)


def test_more_edits(random, ids: Tensor) -> None:
    def edited(site: str) -> Any:
        with random.hooks(fwd_hooks=[(site, lambda v, hook: v + 0.5 * v.abs().max())]):
            return random.run_with_cache(ids)[1]

    for site in ("hook_y[40]", "hook_h[40]"):
        with pytest.raises(CacheError, match="layer 1: a hook edited hook_h or hook_y at position 40"):
            token_relevance(random, edited(f"blocks.1.mixer.{site}"))
    with pytest.raises(CacheError, match=r"layer 1: a hook edited the recurrence \(A_bar"):
        token_relevance(random, edited("blocks.1.mixer.hook_A_bar"))
    with pytest.raises(CacheError, match=r"blocks.1.hook_resid_pre was edited at position 40"):
        token_relevance(random, edited("blocks.1.hook_resid_pre[40]"))
    for site in ("delta", "B", "C", "u_select", "dt_low"):
        cache = edited(f"blocks.1.mixer.hook_{site}[40]")
        found = token_relevance(random, cache, answer=3)
        assert float(found.defect.max()) < 1e-5  # honoured: they are held anyway
        assert found.target.value != token_relevance(random, ids, answer=3).target.value
    found = token_relevance(random, edited("blocks.1.norm.hook_scale[40]"), answer=3)
    assert float(found.defect.max()) < 1e-5
    with torch.no_grad():
        _, state = random(ids, return_state=True)
        with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_delta", lambda v, hook: 1.3 * v)]):
            _, cache = random.run_with_cache(ids, state=state)  # a hooked run that goes on from a state
    assert float(token_relevance(random, cache, answer=3).defect.max()) < 1e-5


def test_weights_that_changed_since_are_refused(ids: Tensor) -> None:
    model = random_model(4)
    with model.hooks(fwd_hooks=[("blocks.1.mixer.hook_delta", lambda v, hook: 1.3 * v)]):
        _, cache = model.run_with_cache(ids)  # block 1 stored everything
    token_relevance(model, cache)
    with torch.no_grad():
        model.blocks[1].mixer.out_proj.weight.mul_(2)
    with pytest.raises(CacheError, match="blocks.1.mixer.out_proj.weight has changed since"):
        token_relevance(model, cache)


def test_bad_input(random, ids: Tensor) -> None:
    with pytest.raises(InputError, match="rule 'halve' is unknown, did you mean 'half'"):
        token_relevance(random, ids, rule="halve")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="d_model = 16 numbers"):
        token_relevance(random, ids, direction=torch.ones(3))
    model = random_model(4)
    reading = read(model, ids)
    with torch.no_grad():
        model.blocks[1].mixer.out_proj = torch.nn.Sequential(model.blocks[1].mixer.out_proj)
    with pytest.raises(InputError, match="layer 1: out_proj is a Sequential"):
        token_relevance(model, reading)
    model.blocks[1].mixer = torch.nn.Identity()
    with pytest.raises(InputError, match="layer 1 has no selective scan"):
        token_relevance(model, reading)
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_delta[5]", lambda v, hook: v * math.nan)]):
        _, cache = random.run_with_cache(ids)
    with pytest.raises(InputError, match="NaN or infinite at position 5"):
        token_relevance(random, cache)
