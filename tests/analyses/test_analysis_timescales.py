"""Half-lives against the definition written out, reach against the map, and gating groups against chance."""

import math

import pytest
import torch
from hand_built import random_model
from torch import Tensor

from mambascope import ops
from mambascope.analyses import gates_by, reach, read, timescale_spectrum
from mambascope.analyses.gating_groups import word_class
from mambascope.analyses.timescales import half_lives
from mambascope.errors import CacheError, InputError


def by_definition(delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The least k with |A| Σ delta[t+1…t+k] >= ln 2, written out."""
    length, width = delta.shape
    median, censored = torch.zeros(A.shape, dtype=torch.float64), torch.zeros(A.shape, dtype=torch.float64)
    for d in range(width):
        for n in range(A.shape[1]):
            found = []
            for t in range(length):
                total, k = 0.0, math.inf
                for s in range(t + 1, length):
                    total += float(delta[s, d].double())
                    if float(A[d, n].double().abs()) * total >= math.log(2):
                        k = s - t
                        break
                found.append(k)
            ordered = sorted(found)
            median[d, n] = (ordered[(length - 1) // 2] + ordered[length // 2]) / 2
            censored[d, n] = sum(math.isinf(k) for k in found) / length
    return median, censored


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("length", "N"), [(1, 1), (2, 7), (63, 1), (64, 16), (65, 7)])
def test_half_lives_are_the_definition(length: int, N: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambascope.analyses.timescales._COMPILED", 0 if compiled else 1 << 60)
    monkeypatch.setattr("mambascope.analyses.timescales._SEARCHED", 3 * length * N)  # channels in groups of three
    g = torch.Generator().manual_seed(length)
    delta = torch.exp(torch.rand(length, 5, generator=g) * math.log(50 / 1e-4) + math.log(1e-4))  # 1e-4…50
    A = -torch.rand(5, N, generator=g) * 4 - 0.01
    median, censored = by_definition(delta, A)
    found = half_lives(delta, A)
    assert torch.equal(found.median, median)
    assert torch.allclose(found.censored, censored)
    assert not torch.equal(half_lives(delta / 9, A).median, median) or length < 3  # the check can fail


@pytest.mark.parametrize("compiled", [False, True])
def test_half_lives_by_hand(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambascope.analyses.timescales._COMPILED", 0 if compiled else 1 << 60)
    # delta 0.5 everywhere: 0.5 k |A| >= 0.6931: k = 2 at |A| = 1, 1 at 2, 14 at 0.1
    delta = torch.full((40, 1), 0.5)
    found = half_lives(delta, torch.tensor([[-1.0, -2.0, -0.1, -0.01]]))
    assert found.median.tolist() == [[2, 1, 14, math.inf]]
    assert found.censored.tolist() == [[2 / 40, 1 / 40, 14 / 40, 1.0]]
    # a sum that is ln 2 exactly reaches it, whatever the prefix sums round to
    exact = half_lives(torch.full((50, 1), math.log(2), dtype=torch.float64), torch.tensor([[-1.0, -0.5]]).double())
    assert exact.median.tolist() == [[1, 2]]
    # one wide opening at token 10 of 20: every earlier t waits for it, every later one is censored
    delta = torch.zeros(20, 1)
    delta[10] = 100.0
    found = half_lives(delta, torch.tensor([[-1.0]]))
    assert found.censored.item() == 0.5  # t = 10…19
    assert found.median.item() == math.inf  # half are censored
    assert half_lives(delta[:19], torch.tensor([[-1.0]])).median.item() == 10


@pytest.mark.parametrize("compiled", [False, True])
def test_delta_that_underflows_or_saturates(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambascope.analyses.timescales._COMPILED", 0 if compiled else 1 << 60)
    A = -torch.arange(1.0, 17.0)[None]
    assert torch.isinf(half_lives(torch.full((30, 1), 1e-38), A).median).all()
    assert (half_lives(torch.full((30, 1), 1e6), A).median == 1).all()
    assert (half_lives(torch.full((30, 1), 1e38), A * 1e30).median == 1).all()  # a threshold below rounding
    dead = half_lives(torch.rand(30, 1), A * 0)
    assert torch.isinf(dead.median).all() and (dead.censored == 1).all()


def test_timescales_of_a_model(random, ids: Tensor) -> None:
    found = timescale_spectrum(random, ids)
    _, cache = random.run_with_cache(ids)
    median, censored = by_definition(cache["delta", 1][0], random.decay(1))
    assert torch.equal(found.half_life[1], median)
    assert torch.allclose(found.censored[1], censored)
    table = found.table()
    assert list(table.columns) == ["layer", "10%", "50%", "90%", "median beyond the text", "censored"]
    assert table["censored"][1] == pytest.approx(float(censored.mean()))
    shares, edges = found.spectrum(per_octave=1)
    assert torch.allclose(shares.sum(1), torch.ones(3, dtype=torch.float64))
    assert edges == [1, 2, 4, 8, 16, 32, 64, 128, math.inf]
    assert shares[1, -1] == pytest.approx(float(torch.isinf(median).double().mean()))
    assert shares[1, 0] == pytest.approx(float((median < 2).double().mean()))
    assert timescale_spectrum(random, ids, layers=[-1]).layers == (2,)


def test_one_token_is_censored(random) -> None:
    found = timescale_spectrum(random, [3])
    assert torch.isinf(found.half_life).all()
    assert (found.censored == 1).all()
    assert found.figure().data[0].z.shape == (3, 4)


def test_a_longer_memory_is_seen(ids: Tensor) -> None:
    model = random_model(1)
    with torch.no_grad():
        model.blocks[1].mixer.dt_proj.weight.zero_()  # delta does not depend on the token
    before = timescale_spectrum(model, ids).half_life
    with torch.no_grad():
        model.blocks[1].mixer.A_log.sub_(math.log(4))  # a quarter of the decay
    after = timescale_spectrum(model, ids).half_life
    assert torch.equal(after[0], before[0])
    seen = torch.isfinite(after[1])
    assert 0.1 < float(seen.double().mean()) < 1
    assert bool((after[1][seen] <= 4 * before[1][seen]).all())
    assert bool((after[1][seen] > 4 * (before[1][seen] - 1)).all())


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = torch.searchsorted

    def watched(sorted_sequence: Tensor, values: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, values.numel())
        return original(sorted_sequence, values)

    monkeypatch.setattr(torch, "searchsorted", watched)
    delta, A = torch.rand(3000, 90), -torch.rand(90, 16) - 0.1
    quick = half_lives(delta, A)  # long enough to be compiled
    assert largest == 0
    monkeypatch.setattr("mambascope.analyses.timescales._COMPILED", 1 << 60)
    found = half_lives(delta, A)
    assert 1 << 20 < largest <= 1 << 21
    assert torch.equal(found.median, quick.median)
    assert torch.equal(found.censored, quick.censored)


# ---- reach


def test_reach_is_that_of_the_map(random, ids: Tensor) -> None:
    found = reach(random, ids, layers=[0, 2], queries=[20, -1], channels=[3, -1])
    _, cache = random.run_with_cache(ids)
    for i, layer in enumerate((0, 2)):
        for j, d in enumerate((3, random.cfg.d_inner - 1)):
            delta, B, C = (cache[n, layer].double() for n in ("delta", "B", "C"))
            A = random.decay(layer).double()[d : d + 1]
            alpha = ops.kernel_map(delta[..., d : d + 1], A, B, C)[0]
            distance, beyond = [], []
            for t in (20, 74):
                row = alpha[t, : t + 1]
                away = torch.arange(t, -1, -1)
                distance.append(float((row * away).sum() / row.sum()))
                beyond.append([float(row[away > k].sum() / row.sum()) for k in found.lags])
            assert float(found.distance[i, j]) == pytest.approx(sum(distance) / 2, rel=1e-4)
            assert found.beyond[i, j].tolist() == pytest.approx(
                torch.tensor(beyond).mean(0).tolist(), rel=1e-3, abs=1e-6
            )
    assert found.channels == (3, random.cfg.d_inner - 1)
    assert list(found.by_channel(2)["channel"]) in ([3, found.channels[1]], [found.channels[1], 3])
    assert not torch.allclose(found.distance[0], found.distance[1])


def test_a_layer_that_forgets_at_once_is_local_and_one_that_never_does_is_global(recall, ids: Tensor) -> None:
    model = random_model(2)
    with torch.no_grad():
        model.blocks[0].mixer.A_log.fill_(16)  # decays by exp(-9e6 delta)
        model.blocks[1].mixer.A_log.fill_(-20)
    found = reach(model, ids, local_below=2, global_above=10)
    assert found.local.tolist()[:2] == [1.0, 0.0]
    assert float(found.far[1]) > 0.9
    assert float(found.beyond[0, :, 0].max()) < 1e-3  # next to nothing beyond one token
    kinds = found.by_channel(0)["kind"]
    assert set(kinds) == {"local"}
    assert found.table()["global"][1] == float(found.far[1])


def test_reach_of_one_token(random) -> None:
    found = reach(random, [3])
    assert (found.distance == 0).all()
    assert (found.beyond == 0).all()
    assert found.queries == (0,)


def test_channels_that_read_nothing(recall) -> None:
    found = reach(recall, [1, 2, 3, 1, 2, 3], channels=[recall.cfg.d_inner - 1])  # delta·B is 0 for unseen slots
    assert found.distance.shape == (1, 1)
    fresh = random_model(3)
    with torch.no_grad():
        for block in fresh.blocks:
            block.mixer.x_proj.weight.zero_()  # B = C = 0
    found = reach(fresh, [1, 2, 3])
    assert found.distance.isnan().all()
    assert found.local.tolist() == [0.0] * 3


def test_bad_input(random, ids: Tensor) -> None:
    with pytest.raises(InputError, match="layer 3 is outside the model's 3 layers"):
        timescale_spectrum(random, ids, layers=[3])
    with pytest.raises(InputError, match="at least one layer"):
        timescale_spectrum(random, ids, layers=[])
    with pytest.raises(InputError, match="channels is empty: name at least one"):
        reach(random, ids, channels=[])
    with pytest.raises(InputError, match="channel 99 is outside the layer's 32 channels"):
        reach(random, ids, channels=[99])
    with pytest.raises(InputError, match="query 75 is outside the text of 75 tokens"):
        reach(random, ids, queries=[75])
    with pytest.raises(InputError, match="list of queries is empty"):
        reach(random, ids, queries=[])
    with pytest.raises(InputError, match="0 < local_below"):
        reach(random, ids, local_below=9, global_above=3)
    with pytest.raises(InputError, match="layer 1 was not looked at"):
        reach(random, ids, layers=[0]).by_channel(1)
    with pytest.raises(InputError, match="per_octave"):
        timescale_spectrum(random, ids).spectrum(0)


def test_edited_blocks(random, ids: Tensor) -> None:
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_delta", lambda v, hook: torch.full_like(v, 0.5))]):
        _, cache = random.run_with_cache(ids)
    k = torch.ceil(math.log(2) / (0.5 * random.decay(1).abs().double()))
    seen = k < 30
    assert torch.equal(timescale_spectrum(random, cache).half_life[1][seen], k[seen])  # honoured
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_h[5]", lambda v, hook: 2 * v)]):
        _, cache = random.run_with_cache(ids)
    assert reach(random, cache, layers=[0, 2]).layers == (0, 2)
    with pytest.raises(CacheError, match="layer 1: a hook edited hook_h or hook_y at position 5"):
        reach(random, cache)
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_delta[5]", lambda v, hook: v * math.nan)]):
        _, cache = random.run_with_cache(ids)
    with pytest.raises(InputError, match="delta of layer 1 is NaN or infinite at position 5"):
        timescale_spectrum(random, cache)


def test_a_layer_without_a_scan(ids: Tensor) -> None:
    model = random_model(4)
    reading = read(model, ids)
    model.blocks[1].mixer = torch.nn.Identity()
    with pytest.raises(InputError, match=r"layer 1 has no selective scan \(its mixer is Identity\)"):
        timescale_spectrum(model, reading, layers=[1])
    with pytest.raises(InputError, match="layer 1 has no selective scan"):
        reach(model, reading, layers=[0, 1])
    assert reach(model, reading).layers == (0, 2)  # all that have one


# ---- delta by token, position, class


def test_word_classes() -> None:
    classes = {
        " the": "function word", "The": "function word", "a": "piece", " a": "function word", "ing": "piece",
        " whale": "word", " Ahab": "name", "Ahab": "name", " 1851": "number", ".": "punctuation", " —": "punctuation",
        "\n\n": "line break", "  ": "blank", "<|endoftext|>": "special", "[17]": "special", " 3rd": "number",
    }  # fmt: skip
    assert {text: word_class(text) for text in classes} == classes


def test_groups_of_known_values(speaking) -> None:
    text = "the cat. the dog. the end."
    hot = [c in " ." for c in text]

    def edit(value: Tensor, hook: object) -> Tensor:
        value = torch.full_like(value, 0.1)
        value[:, torch.tensor(hot)] = 1.0
        return value

    with speaking.hooks(fwd_hooks=[("blocks.0.mixer.hook_delta", edit)]):
        _, cache = speaking.run_with_cache(text)
    found = gates_by(speaking, cache, ["gap" if x else "letter" for x in hot])
    assert found.groups == ("letter", "gap")
    assert found.count.tolist() == [len(text) - sum(hot), sum(hot)]
    assert float(found.explained[0]) == pytest.approx(1.0)
    assert float(found.p[0]) == pytest.approx(1 / 201)
    assert float(found.mean[0, 1] - found.mean[0, 0]) == pytest.approx(math.log(10), rel=1e-5)
    assert float(found.chance[0]) < 0.2
    table = found.table()
    assert list(table.columns) == ["label", "tokens", "mean", "layer 0", "layer 1", "layer 2"]
    assert gates_by(speaking, cache, "class").groups[0] == "piece"
    assert gates_by(speaking, cache, "position").groups[:4] == ("0", "1", "2–3", "4–7")
    assert found.by_layer()["p"].tolist() == found.p.tolist()


def test_shuffled_labels_and_random_weights_score_at_chance(speaking) -> None:
    g = torch.Generator().manual_seed(5)
    text = "".join(chr(97 + i) if i < 26 else " ,.;"[i % 4] for i in torch.randint(0, 34, (400,), generator=g).tolist())
    reading = read(speaking, text)
    shuffled = gates_by(speaking, reading, [str(i) for i in torch.randint(0, 5, (400,), generator=g).tolist()])
    assert torch.allclose(shuffled.explained, shuffled.chance, atol=0.02)
    assert (shuffled.p > 0.01).all()
    # an untrained model's delta depends on the token, but not on the token's class
    small = []
    for seed in range(4):
        model = random_model(seed, tokenizer=speaking.tokenizer)
        small.append(gates_by(model, text, "class").p)
    p = torch.cat(small)
    assert float(p.mean()) > 0.25  # 0.5 expected
    assert float((p < 0.02).double().mean()) < 0.2
    by_token = gates_by(speaking, reading, "token", layers=[0])  # the measure can rise: layer 0 sees the token itself
    assert float(by_token.explained) > 2 * float(by_token.chance)
    assert float(by_token.p) < 0.01


def test_constant_delta_explains_nothing(ids: Tensor) -> None:
    model = random_model(5)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.dt_proj.weight.zero_()
    found = gates_by(model, ids, "position")
    assert found.explained.tolist() == [0.0] * 3
    assert found.p.tolist() == [1.0] * 3


def test_bad_groups(random, ids: Tensor) -> None:
    with pytest.raises(InputError, match="grouping 'clas' is unknown, did you mean 'class'"):
        gates_by(random, ids, "clas")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="3 labels for a text of 75 tokens"):
        gates_by(random, ids, ["a", "b", "c"])
    with pytest.raises(InputError, match="shuffles must be a positive"):
        gates_by(random, ids, shuffles=0)


def test_figures(random, ids: Tensor) -> None:
    heat = timescale_spectrum(random, ids).figure()
    assert heat.data[0].z.sum() == pytest.approx(3)
    assert heat.layout.xaxis.ticktext[-1] == "∞"
    lines = reach(random, ids, layers=[0, 2]).figure()
    assert [trace.name for trace in lines.data] == ["layer 0", "layer 2"]
    groups = gates_by(random, ids, "position").figure()
    assert groups.data[0].z.shape[0] == 3
