"""Random combinations: a padded row comes out as if it were alone, a grown text as if it were read at once."""

import random
from typing import Any

import pytest
import torch

import mambascope as ms
from tests.conftest import BACKENDS, error, make_model

iv = ms.interventions
PLACES = ("mixer.hook_B", "mixer.hook_delta", "mixer.hook_u", "mixer.hook_y", "mixer.hook_gated", "hook_mixer_out")


def some_edits(rng: random.Random, lengths: list[int], rows: list[int], donor: Any = None) -> list[Any]:
    """One to three edits, each in a layer of its own, at places of their own in every row; the same for one seed."""
    out: list[Any] = []
    kinds = ["decay", "scale", "clamp", "knockout", "conv"] + ["patch", "freeze", "later"] * (donor is not None)
    for layer in rng.sample(range(3), rng.randint(1, 3)):
        kind = rng.choice(kinds)
        t = [rng.randint(0, n - 1) for n in lengths]
        low, mine, h = min(t), [t[b] for b in rows], f"blocks.{layer}.mixer.hook_h"
        if kind == "decay":
            out.append(iv.decay(layer, mine, 0.3))
        elif kind == "scale":
            out.append(iv.scale(ms.at(f"blocks.{layer}.{rng.choice(PLACES)}", mine), 1.7))
        elif kind == "clamp":
            out.append(iv.clamp(f"{h}[{rng.choice([0, 1])}]", -0.1, 0.1))
        elif kind == "patch":
            out.append(iv.patch(f"blocks.{layer}.mixer.hook_x[{low}:{max(t) + 1}]", donor))
        elif kind == "freeze":
            out.append(iv.freeze(donor, rng.choice(["delta", "silu", "C"]), layer))
        elif kind == "later":
            out.append(iv.scale(f"blocks.{layer}.mixer.hook_{rng.choice(['h', 'write', 'A_bar'])}[{low}:]", 0.9))
        elif donor is not None:
            out.append(iv.knockout(layer, [low], slice(low, None), through="conv" if kind == "conv" else "scan"))
        else:
            ends = [[lengths[b] - 1] for b in rows]
            out.append(iv.knockout(layer, [[0]] * len(rows), ends, through="conv" if kind == "conv" else "scan"))
    return out


@pytest.mark.parametrize("seed", range(12))
def test_a_padded_row_is_edited_as_if_it_were_alone(seed: int) -> None:
    rng = random.Random(seed)
    model = make_model(seed=seed, backend=BACKENDS[seed % 3])
    batch, length = rng.randint(1, 4), rng.randint(3, 30)
    lengths = [length] + [rng.randint(2, length) for _ in range(batch - 1)]
    tokens = torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for b, n in enumerate(lengths):
        left = rng.randint(0, length - n)
        mask[b, left : left + n] = True

    def edits(rows: list[int]) -> list[Any]:
        return some_edits(random.Random(1000 + seed), lengths, rows)

    with torch.no_grad():
        together = model.run_with(tokens, edits(list(range(batch))), attention_mask=mask)
        with model.intervene(edits(list(range(batch)))):
            cached, _ = model.run_with_cache(tokens, attention_mask=mask)
        for b in range(batch):
            alone = model.run_with(tokens[b : b + 1, mask[b]], edits([b]))[0]
            assert error(together[b, mask[b]], alone) < 2e-5
            assert error(cached[b, mask[b]], alone) < 2e-5


@pytest.mark.parametrize("seed", range(12))
def test_a_grown_text_is_edited_as_if_it_were_read_at_once(seed: int) -> None:
    rng = random.Random(seed)
    model = make_model(seed=seed, backend=BACKENDS[seed % 3])
    batch, length, more = rng.randint(1, 3), rng.randint(2, 8), rng.randint(1, 6)
    generator, read = torch.Generator().manual_seed(seed), length + more - 1
    prompt = torch.randint(0, 50, (batch, length), generator=generator)
    with torch.no_grad():
        donor = model.run_with_cache(torch.randint(0, 50, (1, read), generator=generator))[1]

        def edits() -> list[Any]:
            return some_edits(random.Random(1000 + seed), [read] * batch, list(range(batch)), donor)

        with model.intervene(edits()):
            text, cache = model.generate(prompt, max_new_tokens=more, stop_tokens=[], return_cache=True)
        grown = (cache["ln_final.hook_normalized"] * model.ln_final.weight) @ model.W_U
        assert error(grown, model.run_with(text[:, :-1], edits())) < 2e-5
