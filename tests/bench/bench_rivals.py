"""The rivals on a device: first whether their numbers are right there, then how long they take beside Mamba.

    python -m tests.bench.bench_rivals --device cuda [--out docs/results/rivals_h100.csv]

Gate, for each mixer: float32 against float64 on the CPU, a split against one run, steps against one run, reading steps
against bits, an edited step against the CPU, padding on either side, gradients in eval mode, bf16. Then forward,
forward + backward and one token of two layers of 768 channels, beside Mamba's; medians, float32.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambascope.config import MambaConfig
from mambascope.hooks.points import spec_of
from mambascope.model import HookedMamba
from tests.bench.origin import commit

GATE, LETTERS = 2e-5, "lgsph"


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).abs().max() / b.double().abs().max())


def make(letter: str, dtype: torch.dtype, device: str = "cpu", **options: int) -> HookedMamba:
    torch.manual_seed(1)
    base = {"d_model": 64, "n_layers": 2, "d_vocab": 50, "d_state": 8}
    cfg = MambaConfig(**{**base, **options}, pattern=letter, initializer_range=0.5)  # type: ignore[arg-type]
    return HookedMamba(cfg).to(dtype).to(device)


def gate(letter: str, device: str) -> dict[str, float]:
    """Every comparison's error; bits count as 0 or 1."""
    exact, model = make(letter, torch.float64), make(letter, torch.float32, device)
    ids = torch.randint(0, 50, (3, 130), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :40], mask[1, 90:] = 0, 0
    points = [n for n in model.hook_dict if n.startswith("blocks.0.") and spec_of(n).stepwise]
    found: dict[str, float] = {}
    with torch.no_grad():
        want, want_state = exact(ids, return_state=True)
        plain, state = model(ids, return_state=True)
        found["float64"] = error(plain, want)
        pairs = zip(state.layers, want_state.layers, strict=True)
        found["states"] = max(error(a.tensors()[n], v) for a, b in pairs for n, v in b.tensors().items())
        first, middle = model(ids[:, :57], return_state=True)
        found["split"] = error(torch.cat([first, model(ids[:, 57:], state=middle)], 1), want)
        step, logits = model.initial_state(3), plain[:, -1]
        for t in range(130):
            logits, step = model.step(ids[:, t], step)
        found["steps"] = error(logits, want[:, -1])
        again = model.run_with_hooks(ids, fwd_hooks=[(f"{n}[70:80]", lambda v, hook: v) for n in points])
        found["bits"] = float(not torch.equal(again, plain))
        hooks = [(f"{n}[64]", lambda v, hook: 0.5 * v) for n in points]
        found["edit"] = error(model.run_with_hooks(ids, fwd_hooks=hooks), exact.run_with_hooks(ids, fwd_hooks=hooks))
        real = mask.bool()
        found["padding"] = error(model(ids, attention_mask=mask).cpu()[real], exact(ids, attention_mask=mask)[real])
    grads = []
    for m in (exact, model):
        m.zero_grad()
        m(ids, return_type="loss").backward()
        grads.append([p.grad for p in m.parameters()])
    found["gradients"] = max(error(b, a) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]
    with torch.no_grad():
        found["bf16 / 1000"] = error(model.to(torch.bfloat16)(ids), want) / 1000
    return found


def seconds(step: Callable[[], object], device: str, runs: int = 7) -> float:
    took = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took[2:])


def times(letter: str, device: str, width: int, batch: int, length: int) -> dict[str, float]:
    """ms of forward, forward + backward, and one token, two layers, float32."""
    model = make(letter, torch.float32, device, d_model=width, d_state=16)
    ids = torch.randint(0, 50, (batch, length), device=device)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, return_type="loss").backward()

    with torch.no_grad():
        forward = seconds(lambda: model(ids, logits_to_keep=1), device)
        _, state = model(ids, return_state=True)
        token = seconds(lambda: model.step(ids[:, 0], state), device)
    row = {"forward": forward, "forward + backward": seconds(both, device), "token": token}
    return {name: round(1e3 * value, 3) for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        rnn: Any = torch.backends.cudnn.rnn
        rnn.fp32_precision = "ieee"  # the gate compares gradients, too
    red = False
    for letter in LETTERS:
        found = gate(letter, arguments.device)
        bad = [name for name, value in found.items() if not value <= GATE * (5 if name == "gradients" else 1)]
        bad = [name for name in bad if not (name.startswith("bf16") and found[name] <= 1e-4)]
        red |= bool(bad)
        print(letter, " ".join(f"{k} {v:.1e}" for k, v in found.items()), "FAILED: " + ", ".join(bad) if bad else "ok")
    if red:
        sys.exit("the gate is red: no times")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    shape = {"width": arguments.width, "batch": arguments.batch, "length": arguments.length}
    origin = {"device": name, "torch": torch.__version__, "commit": commit()}
    rows = [
        {"mixer": letter, **shape, **times(letter, arguments.device, **shape), **origin} for letter in "m" + LETTERS
    ]
    for row in rows:
        print(row)
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
