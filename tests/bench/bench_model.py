"""Whole-model timings at 130m size on the CPU, interleaved in one process with transformers' model.

    python -m tests.bench.bench_model [--threads 2] [--csv FILE]

First a correctness gate (logits against float64, beside transformers), then medians and ratios: forward against the
model's own matrix products and against transformers, forward + backward, one generated token, everything
open (run_with_cache without a filter), one layer's delta read afterwards, memory. Timings are only
meaningful on a quiet machine; the ratios are what the table is for.
"""

import argparse
import copy
import csv
import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mambascope.config import MambaConfig
from mambascope.model import HookedMamba

LAYERS, WIDTH, INNER, VOCAB, RANK = 24, 768, 1536, 50280, 48


def build() -> tuple[HookedMamba, torch.nn.Module]:
    """Ours and transformers' model of the same random weights."""
    from transformers import MambaConfig as HfConfig
    from transformers import MambaForCausalLM

    torch.manual_seed(0)
    config = HfConfig(vocab_size=VOCAB, hidden_size=WIDTH, state_size=16, num_hidden_layers=LAYERS, use_cache=True)
    peer = MambaForCausalLM(config).eval()
    model = HookedMamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS, d_vocab=VOCAB), backend="cpu")
    names = dict(peer.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            source = name.replace("blocks.", "backbone.layers.").replace("ln_final", "backbone.norm_f")
            source = source.replace("embed.weight", "backbone.embeddings.weight") if name == "embed.weight" else source
            p.copy_(names[source])
    return model, peer


class Products:
    """The model's own matrix products and nothing else: the floor."""

    def __init__(self, model: HookedMamba) -> None:
        self.weights = [
            [m.in_proj.weight, m.x_proj.weight, m.dt_proj.weight, m.out_proj.weight]
            for m in (block.mixer for block in model.blocks)
        ]
        self.head = model.unembed.weight

    def forward(self, length: int) -> Callable[[], None]:
        inputs = [torch.randn(length, n) for n in (WIDTH, INNER, RANK, INNER)]

        def run() -> None:
            for layer in self.weights:
                for x, w in zip(inputs, layer, strict=True):
                    F.linear(x, w)
            F.linear(inputs[0], self.head)

        return run


def medians(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each case, the cases taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for fn in cases.values():
        fn()
    for _ in range(repeats):
        for name, fn in cases.items():
            gc.collect()
            start = time.perf_counter()
            fn()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def forward_rows(model: HookedMamba, peer: torch.nn.Module, length: int, repeats: int) -> dict[str, float]:
    ids = torch.randint(0, VOCAB, (1, length))
    held: dict[str, object] = {}

    def open_run() -> None:
        held["cache"] = model.run_with_cache(ids)[1]

    def read_delta() -> Tensor:
        cache = held["cache"]
        cache._replays.clear()  # type: ignore[attr-defined]
        return cache["delta", 12]  # type: ignore[index]

    resid = model(ids, stop_at_layer=12)
    cases: dict[str, Callable[[], object]] = {
        "products": Products(model).forward(length),
        "forward": lambda: model(ids),
        "open": open_run,
        "transformers": lambda: peer(ids, use_cache=False).logits,
        "one layer": lambda: model(resid, start_at_layer=12, stop_at_layer=13),
        "read delta": read_delta,
    }
    with torch.no_grad():
        return medians(cases, repeats)


def backward_rows(model: HookedMamba, peer: torch.nn.Module, length: int) -> dict[str, float]:
    """One forward + backward of the peer (it takes minutes) between two of ours."""
    ids = torch.randint(0, VOCAB, (1, length))

    def ours() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, return_type="loss").backward()

    def theirs() -> None:
        peer.zero_grad(set_to_none=True)
        peer(ids, labels=ids, use_cache=False).loss.backward()

    def once(fn: Callable[[], None]) -> float:
        start = time.perf_counter()
        fn()
        return (time.perf_counter() - start) * 1e3

    ours()
    first, peer_ms, second = once(ours), once(theirs), once(ours)
    return {"forward+backward": (first + second) / 2, "transformers f+b": peer_ms}


def token_rows(model: HookedMamba, peer: torch.nn.Module, repeats: int) -> dict[str, float]:
    ids = torch.randint(0, VOCAB, (1, 16))
    with torch.no_grad():
        _, state = model(ids, return_state=True)
        token = ids[:, -1]
        cases: dict[str, Callable[[], object]] = {
            "vector products": Products(model).forward(1),
            "one token": lambda: model.step(token, state),
        }
        return medians(cases, repeats)


def check(model: HookedMamba, peer: torch.nn.Module) -> None:
    """The correctness gate: against float64 our logits must be no further off than transformers' own.

    A random 24-layer model amplifies rounding (all float32 implementations are 2e-4 off), so the peer's
    error is the yardstick here; the tests compare well-conditioned models to 2e-5.
    """
    ids = torch.randint(0, VOCAB, (1, 48))
    with torch.no_grad():
        exact_model = copy.deepcopy(model).double()
        exact_model.backend = "reference"
        exact = exact_model(ids)
        ours, theirs = (
            ((logits.double() - exact).abs().max() / exact.abs().max()).item()
            for logits in (model(ids), peer(ids, use_cache=False).logits)
        )
    print(f"gate: error against float64, ours {ours:.1e}, transformers {theirs:.1e}")
    if not ours <= 2 * theirs:
        sys.exit("the correctness gate failed: no timings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backward", action="store_true", help="also forward + backward (minutes for transformers)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, peer = build()
    check(model, peer)
    rows: list[tuple[str, float, str]] = []

    def add(what: str, value: float, bar: str) -> None:
        rows.append((what, value, bar))
        print(f"{what:58s} {value:9.2f}   {bar}", flush=True)

    for length, repeats, share in ((64, 3 * options.repeats, 0.45), (512, options.repeats, 0.3)):
        ms = forward_rows(model, peer, length, repeats)
        for name, value in ms.items():
            add(f"L={length} {name}, ms", value, "")
        add(f"L={length} forward / its matrix products", ms["forward"] / ms["products"], "bar ≤ 1.35")
        add(f"L={length} forward / transformers", ms["forward"] / ms["transformers"], f"bar ≤ {share}")
        add(f"L={length} everything open / forward", ms["open"] / ms["forward"], "bar ≤ 1.1")
        add(f"L={length} reading one layer's delta / that layer", ms["read delta"] / ms["one layer"], "bar ≤ 1.5")
    ms = token_rows(model, peer, 10 * options.repeats)
    for name, value in ms.items():
        add(f"{name}, ms", value, "")
    add("one token / its matrix-vector products", ms["one token"] / ms["vector products"], "bar ≤ 1.4")
    ids = torch.randint(0, VOCAB, (1, 512))
    with torch.no_grad():
        held = model.run_with_cache(ids)[1].nbytes / 1e6
    add("L=512 caching everything, MB held beyond the logits", held, "bar ≤ 150")
    if options.backward:
        ms = backward_rows(model, peer, 512)
        for name, value in ms.items():
            add(f"L=512 {name}, ms", value, "")
        add("L=512 forward+backward / transformers", ms["forward+backward"] / ms["transformers f+b"], "bar ≤ 0.25")
    if options.csv:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = [
            platform.processor() or platform.machine(),
            f"threads={options.threads}",
            f"torch={torch.__version__}",
            commit,
        ]
        with options.csv.open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["what", "value", "bar", "device", "threads", "torch", "commit"])
            writer.writerows([what, f"{value:.4g}", bar, *about] for what, value, bar in rows)


if __name__ == "__main__":
    main()
