"""Flow between tokens: rows add up, one layer is what the equations say, recall is seen, chance is chance."""

import math
from typing import Any

import pytest
import torch
from hand_built import random_model
from test_analysis_contributions import biased
from torch import Tensor

from mambascope.analyses import read, repeated_tokens, token_flow, token_relevance
from mambascope.errors import CacheError, InputError
from mambascope.model import HookedMamba

WAYS: list[dict[str, Any]] = [
    {"method": "shares"},
    {"method": "gradients"},
    {"method": "gradients", "rule": "half"},
]


@pytest.mark.parametrize("biases", ["rest", "tokens"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"d_state": 1, "mixer_norm_eps": 1e-6}, {"d_state": 16, "d_conv": 1}])
def test_rows_and_rest_add_up(way: Any, biases: Any, options: dict[str, Any], ids: Tensor) -> None:
    model = biased(1, **options)
    with torch.no_grad():
        _, state = model(ids[:, :20], return_state=True)
        _, cache = model.run_with_cache(ids[:, 20:61], state=state)
    found = token_flow(model, cache, biases=biases, **way)
    assert found.weights.shape == (41, 41)
    assert found.error < 1e-5
    assert torch.allclose(found.weights.sum(1) + found.rest, torch.ones(41, dtype=torch.float64), atol=1e-4)
    assert not found.weights.triu(1).any()  # causal
    if biases == "tokens":
        assert float(found.rest.abs().min()) > 0  # the state before the text
        alone = token_flow(model, ids[:, :20], biases="tokens", **way)
        assert float(alone.rest.abs().max()) < 1e-5  # nothing else is left


def one_layer_written_out(model: HookedMamba, ids: Tensor) -> Tensor:
    """The part of each token in the stream after the only block, from its equations, float64."""
    _, cache = model.run_with_cache(ids)
    mixer = model.blocks[0].mixer
    names = ("x", "conv", "delta", "B", "C", "gate_in", "resid_pre", "resid_post")
    x, conv, delta, B, C, z, r, after = (cache[n, 0][0].double().detach() for n in names)
    A, taps = model.decay(0).double(), mixer.conv1d.weight.detach().double()[:, 0]
    x = x - mixer.in_proj.bias.detach().double()[: x.shape[1]]
    K, gate, factor = taps.shape[1], torch.nn.functional.silu(z), torch.sigmoid(conv)
    out = torch.zeros(len(x), len(x), dtype=torch.float64)
    for t in range(len(x)):
        g = (after[t] @ mixer.out_proj.weight.detach().double()) / after[t].pow(2).sum() * gate[t]
        out[t, t] += r[t] @ after[t] / after[t].pow(2).sum()
        for s in range(t + 1):  # a step that writes u[s], made of tokens s - back
            decay = torch.exp(A * delta[s + 1 : t + 1].sum(0)[:, None])
            alpha = (C[t] * decay * delta[s][:, None] * B[s]).sum(1)
            alpha = alpha + (mixer.D.detach().double() if s == t else 0)
            for back in range(min(K, s + 1)):
                out[t, s - back] += (g * alpha * factor[s] * taps[:, K - 1 - back] * x[s - back]).sum()
    return out


def test_one_layer_is_the_equations(ids: Tensor) -> None:
    model = biased(2, n_layers=1)
    want = one_layer_written_out(model, ids[:, :17])
    for way in WAYS[:2]:  # with one layer and the gate held both are the same
        found = token_flow(model, ids[:, :17], **way).weights
        assert torch.allclose(found, want, atol=1e-5 * float(want.abs().max()))
    half = token_flow(model, ids[:, :17], **WAYS[2]).weights
    assert float((half - want).abs().max()) > 1e-2  # the check can fail


def test_shares_roll_up_layer_by_layer(ids: Tensor) -> None:
    from mambascope.analyses.relevance_block import frozen_block
    from mambascope.analyses.rollout import block_shares

    model = biased(3)
    reading = read(model, ids[:, :23])
    parts = [block_shares(frozen_block(reading, i), reading.value("resid_post", i), False) for i in range(3)]
    found = token_flow(model, reading)
    assert torch.allclose(found.weights, parts[2][0] @ parts[1][0] @ parts[0][0])
    for share, rest in parts:  # what the block did, in shares
        assert torch.allclose(share.sum(1) + rest, torch.ones(23, dtype=torch.float64), atol=1e-5)
    some = token_flow(model, reading, queries=[5, -1])
    assert some.queries == (5, 22)
    assert torch.equal(some.weights, found.weights[[5, 22]])


@pytest.mark.parametrize("rule", ["half", "frozen"])
def test_gradients_are_relevance_along_the_stream_itself(rule: Any, ids: Tensor, monkeypatch: Any) -> None:
    model = biased(4)
    reading = read(model, ids)
    last = reading.value("resid_post", 2)
    found = token_flow(model, reading, method="gradients", rule=rule, queries=[40, 3])
    for i, t in enumerate((40, 3)):
        one = token_relevance(model, reading, direction=last[t] / last[t].pow(2).sum(), query=t, rule=rule)
        assert torch.allclose(found.weights[i, : t + 1], one.tokens, atol=1e-5)
        assert float(found.rest[i]) == pytest.approx(float(one.bias.sum() + one.carry.sum()), abs=1e-5)
    monkeypatch.setattr("mambascope.analyses.rollout._HELD", 1)  # one query at a time
    apart = token_flow(model, reading, method="gradients", rule=rule, queries=[40, 3])
    assert torch.allclose(apart.weights, found.weights, atol=1e-6)


def hits(model: HookedMamba, rows: Tensor, way: dict[str, Any], shuffle: bool = False) -> float:
    """How often the largest weight on another token is on the one that followed in the first copy."""
    n, found = rows.shape[1] // 2, []
    for row in rows:
        flow = token_flow(model, row, queries=range(n, 2 * n - 1), **way)
        for i, t in enumerate(flow.queries):
            weights = flow.weights[i, :t].clone()
            wanted = t - n + 1 if not shuffle else (t - n + 1 + n // 2) % n
            found.append(int(weights.argmax()) == wanted)
    return sum(found) / len(found)


@pytest.mark.parametrize("way", WAYS)
def test_recall_is_seen_and_chance_is_chance(recall, way: Any) -> None:
    rows = repeated_tokens(recall, 8, 2, seed=2)
    assert hits(recall, rows, way) == 1.0
    assert hits(recall, rows, way, shuffle=True) == 0.0
    untrained = [hits(random_model(seed, d_vocab=20), rows, way) for seed in range(4)]
    assert sum(untrained) / 4 < 0.25  # 1 in 12 by chance
    profile = token_flow(recall, rows[0], **way).by_lag()
    assert int(profile[1:].argmax()) + 1 == 7  # N - 1 back: the token after the earlier occurrence
    fresh = repeated_tokens(recall, 8, 1, seed=2, repeat=False)
    assert float(token_flow(recall, fresh[0], **way).by_lag()[7]) < float(profile[7])


def test_lags_by_hand(random) -> None:
    found = token_flow(random, [1, 2, 3], queries=[2, 1])
    w = found.weights
    assert w[1, 2] == 0  # the query 1 does not see token 2
    want = [float(w[0, 2] + w[1, 1]) / 2, float(w[0, 1] + w[1, 0]) / 2, float(w[0, 0])]
    assert found.by_lag().tolist() == pytest.approx(want)
    assert token_flow(random, [1, 2, 3], queries=[0]).by_lag().isnan().tolist() == [False, True, True]


def test_one_token(random) -> None:
    for way in WAYS:
        found = token_flow(random, [3], **way)
        assert found.weights.shape == (1, 1)
        assert found.error < 1e-5


def test_bad_input(random, ids: Tensor) -> None:
    for options, match in (
        ({"method": "share"}, "method 'share' is unknown, did you mean 'shares'"),
        ({"rule": "frozn", "method": "gradients"}, "rule 'frozn' is unknown"),
        ({"rule": "half"}, "rolled-up shares hold the gate"),
        ({"biases": "token"}, "biases='token' is unknown, did you mean 'tokens'"),
        ({"queries": [75]}, "query 75 is outside the text of 75 tokens"),
        ({"queries": []}, "list of queries is empty"),
    ):
        with pytest.raises(InputError, match=match):
            token_flow(random, ids, **options)
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_gated[30]", lambda v, hook: 2 * v)]):
        _, cache = random.run_with_cache(ids)
    for way in WAYS[:2]:
        with pytest.raises(CacheError, match="layer 1: a hook edited mixer.hook_gated at position 30"):
            token_flow(random, cache, **way)
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_C[30]", lambda v, hook: v * math.nan)]):
        _, cache = random.run_with_cache(ids)
    with pytest.raises(InputError, match="NaN or infinite at position 30"):
        token_flow(random, cache)
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_C[30]", lambda v, hook: 2 * v)]):
        _, cache = random.run_with_cache(ids)
    assert token_flow(random, cache).error < 1e-5  # honoured
    model = random_model(4)
    reading = read(model, ids)
    model.blocks[1].mixer = torch.nn.Identity()
    with pytest.raises(InputError, match="layer 1 has no selective scan"):
        token_flow(model, reading)


def test_a_map_that_does_not_fit_is_refused_before_it_starts(random, ids: Tensor, monkeypatch: Any) -> None:
    monkeypatch.setattr("mambascope.memory.available_bytes", lambda device: 1000)
    reading = read(random, torch.zeros(1500, dtype=torch.long))
    with pytest.raises(InputError, match=r"the flow of 1,500 x 1,500 tokens would take 72.0 MB on cpu"):
        token_flow(random, reading)


def test_tables_and_figures(speaking) -> None:
    found = token_flow(speaking, "abcabcab")
    table = found.table()
    assert table["weight"].abs().is_monotonic_decreasing
    assert sorted(table["position"]) == list(range(8))
    assert found.figure().data[0].z.shape == (8, 8)
    some = token_flow(speaking, "abcabcab", method="gradients", rule="half", queries=[7, 2]).figure()
    assert some.data[0].z.shape == (2, 8)
    assert list(some.layout.yaxis.ticktext) == ["7", "2"]
    assert "half rule" in some.layout.title.text
    with pytest.raises(InputError, match="query 2 is outside"):
        token_flow(speaking, "abc", queries=[1, 2]).table(2)
