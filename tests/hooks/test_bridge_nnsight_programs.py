"""Random programs: each prompt of a padded batch reads and edits its own places, and gets what hooks give it alone."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import mambascope as ms
from mambascope.hooks.points import LAZY, points_of
from tests.conftest import BACKENDS, error, make_model

nnsight = pytest.importorskip("nnsight")

Program = list[tuple[str, str]]
ORDER = [spec.name for spec in points_of("m") if spec.scope == "block"]


def program(rng: random.Random, length: int, side: str) -> Program:
    """Sites in the order in which they fire, each to be read, assigned, or edited in place."""
    names = [n for n in ORDER if side == "right" or n not in LAZY or n == "mixer.hook_h"]  # see docs/contract.md
    steps: Program = []
    for layer in (0, 1):
        for name in sorted(rng.sample(names, rng.choice([0, 1, 2, 3])), key=ORDER.index):
            if name == "mixer.hook_h":
                places = sorted(rng.sample(range(length), 2))
                indices = [str(p if rng.random() < 0.5 else p - length) for p in places]
            else:
                indices = [rng.choice([":", "1:", str(rng.randrange(length)), str(-1 - rng.randrange(length))])]
            steps += [(f"blocks.{layer}.{name}[{i}]", rng.choice(["read", "set", "in place"])) for i in indices]
    return steps


def by_hooks(model: Any, tokens: Tensor, steps: Program) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []

    def hook_for(kind: str) -> Any:
        def hook(value: Tensor, hook: object) -> Tensor | None:
            seen.append(value.clone())
            return None if kind == "read" else value * 0.7

        return hook

    out = model.run_with_hooks(tokens, fwd_hooks=[(site, hook_for(kind)) for site, kind in steps])
    return out, seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_every_prompt_gets_what_it_would_get_alone(backend: str, seed: int) -> None:
    rng = random.Random(seed)
    side, lengths = rng.choice(["left", "right"]), [rng.choice([3, 5, 9, 9]) for _ in range(rng.choice([1, 2, 3]))]
    model = make_model(seed, backend=backend, n_layers=2)
    lm = ms.wrap(model, side)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 50, (1, n), generator=generator) for n in lengths]
    programs = [program(rng, n, side) for n in lengths]
    with torch.no_grad():
        wanted = [by_hooks(model, x, steps) for x, steps in zip(prompts, programs, strict=True)]
        with lm.trace() as tracer:
            found = nnsight.save([])
            for x, steps in zip(prompts, programs, strict=True):
                with tracer.invoke(x):
                    values = []
                    for site, kind in steps:
                        values.append(lm.site(site).output.clone())
                        if kind == "set":
                            lm.site(site).output = lm.site(site).output * 0.7
                        if kind == "in place":
                            lm.site(site).output.mul_(0.7)
                    found.append((lm.output.clone(), values))
    for (logits, values), (want, seen), x, steps, n in zip(found, wanted, prompts, programs, lengths, strict=True):
        columns = slice(max(lengths) - n, None) if side == "left" else slice(0, n)
        assert error(logits[:, columns], want) < 5e-6
        assert len(values) == len(seen)
        edited = any(kind != "read" for _, kind in steps)
        assert torch.equal(want, model(x)) is not edited
        for value, ours in zip(values, seen, strict=True):
            assert error(value, ours) < 5e-6
