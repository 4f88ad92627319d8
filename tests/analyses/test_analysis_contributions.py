"""Direct contributions to a logit: they add up, they are the kernel's, interventions confirm them."""

import math

import pytest
import torch
from hand_built import random_model, recall_model
from torch import Tensor

from mambascope.analyses import logit_contributions, read, repeated_tokens
from mambascope.errors import CacheError, InputError
from mambascope.model import HookedMamba


def biased(seed: int = 0, **options: object) -> HookedMamba:
    """A random model whose projections have biases and whose layers write a lot."""
    model = random_model(seed, proj_bias=True, **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            for bias in (block.mixer.out_proj.bias, block.mixer.in_proj.bias):
                bias.copy_(0.3 * torch.randn(bias.shape, generator=g))
            block.mixer.out_proj.weight.mul_(3)
            block.norm.weight.add_(0.3 * torch.randn(block.norm.weight.shape, generator=g))
        model.ln_final.weight.add_(0.3 * torch.randn(model.ln_final.weight.shape, generator=g))
    return model


@pytest.mark.parametrize("N", [1, 7, 16])
@pytest.mark.parametrize("length", [1, 2, 63])
def test_they_add_up_to_the_logit(N: int, length: int, ids: Tensor) -> None:
    model = biased(N, d_state=N)
    text = ids[:, :length]
    with torch.no_grad():
        _, state = model(ids, return_state=True)  # h0 is not 0
        logits, cache = model.run_with_cache(text, state=state)
    for query, answer, wrong in ((-1, 3, 5), (length // 2, 7, None), (0, None, None)):
        found = logit_contributions(model, cache, query=query, answer=answer, wrong=wrong)
        row = logits[0, query].double()
        want = row.max() if answer is None else row[answer] - (row[wrong] if wrong is not None else 0)
        assert abs(found.target.value - float(want)) < 1e-4
        assert found.error < 1e-4
        assert found.total == pytest.approx(float(want), abs=1e-4)
        assert float(found.carry.abs().max()) > 0
        for i in range(3):  # each layer's parts are what it wrote
            wrote = cache["mixer_out", i][0, query].double() @ found.target.direction.double()
            assert float(found.by_layer[i]) == pytest.approx(float(wrote), rel=1e-5, abs=1e-5)


def test_they_are_the_kernel_written_out(ids: Tensor) -> None:
    model = biased(1)
    _, cache = model.run_with_cache(ids[:, :33])
    found = logit_contributions(model, cache, answer=3, wrong=5, query=20)
    mixer = model.blocks[1].mixer
    delta, B, C, u, z = (cache[n, 1][0].double() for n in ("delta", "B", "C", "u_write", "gate_in"))
    A = model.decay(1).double()
    g = (mixer.out_proj.weight.detach().double().T @ found.target.direction.double()) * torch.nn.functional.silu(z[20])
    for s in (0, 7, 19, 20):
        decay = torch.exp(A * delta[s + 1 : 21].sum(0)[:, None])
        alpha = (C[20] * decay * delta[s][:, None] * B[s]).sum(1)
        assert float(found.scan[1, s]) == pytest.approx(float((g * alpha * u[s]).sum()), rel=1e-4, abs=1e-7)
    assert float(found.skip[1]) == pytest.approx(float((g * mixer.D.double().detach() * u[20]).sum()), rel=1e-5)
    wrong = (g * u[7]).sum()  # without the kernel
    assert abs(float(found.scan[1, 7]) - float(wrong)) > 1e-3 * abs(float(wrong))
    assert float(found.bias[1]) == pytest.approx(float(mixer.out_proj.bias.detach() @ found.target.direction), rel=1e-5)


def test_by_intervention(ids: Tensor) -> None:
    """What a token wrote into the last layer's state, taken away with the final scale held, takes its share along."""
    model = biased(2)
    logits, cache = model.run_with_cache(ids)
    found = logit_contributions(model, cache, answer=3, wrong=5)
    scale = cache["ln_final.hook_scale"]
    clean = float((logits[0, -1, 3] - logits[0, -1, 5]).detach())
    changes = []
    for s in (5, 60, 73, 74):
        hooks = [
            (f"blocks.2.mixer.hook_u_write[{s}]", lambda u, hook: torch.zeros_like(u)),
            ("ln_final.hook_scale", lambda x, hook: scale.clone()),
        ]
        now = model.run_with_hooks(ids, fwd_hooks=hooks).detach()[0, -1]
        changes.append(float(now[3] - now[5]) - clean)
        assert changes[-1] == pytest.approx(-float(found.scan[2, s]), abs=1e-5)
    assert max(map(abs, changes)) > 1e-3
    free = model.run_with_hooks(ids, fwd_hooks=hooks[:1]).detach()[0, -1]  # the scale not held: not the same
    assert abs(float(free[3] - free[5]) - clean + float(found.scan[2, 74])) > 1e-4


def hits(model: HookedMamba, rows: Tensor, shuffle: bool = False) -> float:
    """How often the largest contribution to the right answer comes from the token that holds it."""
    n, found = rows.shape[1] // 2, []
    for row in rows:
        for t in range(n, 2 * n - 1):
            answer = int(row[t + 1] if not shuffle else row[n + (t + 1 + n // 2) % n])
            source = row[:n].tolist().index(int(row[t + 1]))
            by_token = logit_contributions(model, row, answer=answer, query=t).by_token
            found.append(int(by_token.argmax()) == source)
    return sum(found) / len(found)


def test_recall_is_attributed_to_its_source_and_chance_is_chance(recall) -> None:
    rows = repeated_tokens(recall, 8, 3, seed=2)
    assert hits(recall, rows) == 1.0
    assert hits(recall, rows, shuffle=True) == 0.0  # another token's logit does not come from there
    untrained = [hits(random_model(seed, d_vocab=20), rows) for seed in range(4)]
    assert sum(untrained) / 4 < 0.25  # 1 in 12 by chance


def test_a_direction(random, ids: Tensor) -> None:
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    _, cache = random.run_with_cache(ids)
    found = logit_contributions(random, cache, direction=direction, query=30)
    want = float(cache["resid_post", 2][0, 30] @ direction)
    assert found.total == pytest.approx(want, rel=1e-5)
    assert found.target.name == "along the direction"
    table = found.table()
    assert table["total"].sum() == pytest.approx(want, rel=1e-5)
    assert table["layer"].tolist() == ["embed", "0", "1", "2"]
    assert found.tokens()["total"].tolist() == found.by_token.tolist()


def test_texts_name_tokens(speaking) -> None:
    found = logit_contributions(speaking, "abcabc", answer="d", wrong="e")
    ids = [speaking.to_single_token(c) for c in "de"]
    row = speaking("abcabc").detach()[0, -1]
    assert found.total == pytest.approx(float(row[ids[0]] - row[ids[1]]), abs=1e-5)
    assert found.target.name == "logit of 'd' − 'e'"
    figure = found.figure()
    assert figure.data[0].z.shape == (3, 6)
    assert "logit of" in figure.layout.title.text


def test_bad_input(random, ids: Tensor) -> None:
    with pytest.raises(InputError, match="answer 40 is no id"):
        logit_contributions(random, ids, answer=40)
    with pytest.raises(InputError, match="wrong True is no id"):
        logit_contributions(random, ids, answer=3, wrong=True)
    with pytest.raises(InputError, match="query 75 is outside"):
        logit_contributions(random, ids, query=75)
    with pytest.raises(InputError, match=r"tensor of d_model = 16 numbers, got \(15,\)"):
        logit_contributions(random, ids, direction=torch.ones(15))
    with pytest.raises(InputError, match="direction holds NaN"):
        logit_contributions(random, ids, direction=torch.full((16,), math.nan))
    with pytest.raises(InputError, match="not both"):
        logit_contributions(random, ids, direction=torch.ones(16), answer=3)
    model = random_model(4)
    reading = read(model, ids)
    model.blocks[1].mixer = torch.nn.Identity()
    with pytest.raises(InputError, match="layer 1 has no selective scan"):
        logit_contributions(model, reading)


@pytest.mark.parametrize(
    ("site", "match"),
    [
        ("blocks.1.mixer.hook_y", "layer 1: a hook edited hook_h or hook_y"),
        ("blocks.1.mixer.hook_h", "layer 1: a hook edited hook_h or hook_y"),
        ("blocks.1.mixer.hook_gated", "layer 1: a hook edited hook_gated at position 74"),
        ("blocks.1.hook_mixer_out", "layer 1: a hook edited hook_mixer_out at position 74"),
        ("blocks.2.hook_resid_pre", "edited the residual stream between two blocks"),
        ("ln_final.hook_normalized", "a hook edited ln_final.hook_normalized"),
    ],
)
def test_edits_that_break_the_sum_are_refused(random, ids: Tensor, site: str, match: str) -> None:
    with random.hooks(fwd_hooks=[(site + "[-1]", lambda v, hook: v + 0.5 * v.abs().max())]):
        _, cache = random.run_with_cache(ids)
    with pytest.raises(CacheError, match=match):
        logit_contributions(random, cache, answer=3, wrong=5)


@pytest.mark.parametrize("site", ["delta", "B", "C", "u_write", "u_skip", "gate_in", "x", "conv"])
def test_edits_of_what_the_parts_read_are_honoured(random, ids: Tensor, site: str) -> None:
    with random.hooks(fwd_hooks=[(f"blocks.1.mixer.hook_{site}[10:]", lambda v, hook: 1.5 * v)]):
        logits, cache = random.run_with_cache(ids)
    found = logit_contributions(random, cache, answer=3, wrong=5)
    assert found.total == pytest.approx(float((logits[0, -1, 3] - logits[0, -1, 5]).detach()), abs=1e-5)
    clean = logit_contributions(random, ids, answer=3, wrong=5)
    assert abs(float(found.by_layer[1] - clean.by_layer[1])) > 1e-4


def test_bf16(ids: Tensor) -> None:
    model = recall_model().to(torch.bfloat16)
    rows = repeated_tokens(model, 8, 1, seed=2)
    found = logit_contributions(model, rows[0], query=10)
    assert found.error < 0.02 * abs(found.target.value)
