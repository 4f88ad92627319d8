"""Training throughput of a recipe on this machine, as a share of its floor (matrix products + scans at measured rates).

    python -m tests.bench.bench_training [--model lm-mini-v2] [--steps N] [--profile] [--csv FILE] [--limit SECONDS]

Random tokens stand for the text: no data is needed, and the arithmetic is the same. Rows: the step as it is launched
from Python, and as one recorded CUDA graph; each with the chunked head, the eager one also with whole logits. First
the gate: both heads give the same loss and gradients.
"""

import argparse
import csv
import dataclasses
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambascope.training.build import build_model
from mambascope.training.command import recipe_for
from mambascope.training.floor import Floor, measure_floor
from mambascope.training.head import answer_loss
from mambascope.training.loop import _Run
from mambascope.training.machine import machine
from mambascope.training.recipe import Recipe, TrainSettings
from mambascope.training.sampler import IGNORED, Batch
from tests.bench.origin import commit


def whole_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The loss by the shortest way: all logits at once."""
    logits = model(batch.tokens, return_type="logits")  # B L V
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)


WAYS: tuple[tuple[str, bool, Callable[..., Tensor]], ...] = (
    ("graph, chunked head", True, answer_loss),
    ("eager, chunked head", False, answer_loss),
    ("eager, whole logits", False, whole_logits),
)


def gate(recipe: Recipe, device: str, source: Callable[[int], Batch]) -> float:
    """Largest relative difference of a gradient between the two heads on four rows."""
    model, batch = build_model(recipe, device), source(0)
    few = Batch(batch.tokens[:4], batch.targets[:4].to(device))
    gradients = []
    for loss in (answer_loss, whole_logits):
        model.zero_grad()
        bf16 = device.startswith("cuda") and recipe.train.precision == "bf16"
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            value = loss(model, few)
        value.backward()
        gradients.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*gradients, strict=True))


def run(
    recipe: Recipe, settings: TrainSettings, device: str, source: Callable[[int], Batch], loss: Callable, steps: int
) -> tuple[_Run, float]:
    """Milliseconds a step, after warming up."""
    trainer = _Run(build_model(recipe, device), source, settings, None, {}, loss, print)  # type: ignore[arg-type]
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for step in range(6 if device.startswith("cuda") else 1):
        trainer.step(step)
    sync()
    start = time.perf_counter()
    for step in range(6, 6 + steps):
        trainer.step(step)
    sync()
    return trainer, 1e3 * (time.perf_counter() - start) / steps


def profile(trainer: _Run, rows: int = 32) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with watch(activities=[ProfilerActivity.CUDA]) as watched:
        for step in range(100, 103):
            trainer.step(step)
        torch.cuda.synchronize()
    table = sorted(watched.key_averages(), key=lambda e: -e.device_time_total)[:rows]
    print(f"{'kernel':<90} {'calls/step':>10} {'ms/step':>9}")
    for event in table:
        print(f"{event.key[:90]:<90} {event.count / 3:>10.1f} {event.device_time_total / 3e3:>9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lm-mini-v2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="kernels of a step, by time")
    parser.add_argument("--limit", type=float, default=1e9, metavar="SECONDS", help="start no row after this time")
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    started = time.perf_counter()
    recipe = recipe_for(args.model, args.set)
    train, on_gpu = recipe.train, args.device.startswith("cuda")

    def source(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(recipe.model.n_tokens, (train.batch, train.length + 1), generator=generator)
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    about = machine(args.device)
    count = sum(p.numel() for p in build_model(recipe).parameters())
    print(f"{recipe.name}: {count:,} parameters, {train.batch} x {train.length} tokens a step, {about}")
    difference = gate(recipe, args.device, source)
    bar = 5e-2 if on_gpu and train.precision == "bf16" else 1e-4
    verdict = "passed" if difference <= bar else "FAILED"
    print(
        f"gate {verdict}: largest difference of a gradient between the heads {difference:.1e}, bar {bar:.0e}",
        flush=True,
    )
    dtype = torch.bfloat16 if on_gpu and train.precision == "bf16" else torch.float32
    floor: Floor = measure_floor(build_model(recipe, args.device), train.batch, train.length, dtype=dtype)
    print(floor, flush=True)
    print(f"{'step':<24} {'ms':>9} {'tokens/s':>12} {'of the floor':>13} {'peak GB':>8}")
    rows: list[dict[str, Any]] = []
    for name, graph, loss in WAYS:
        if graph and not on_gpu:
            continue
        if time.perf_counter() - started > args.limit:
            print(f"{name:<24} left out: --limit {args.limit:g} seconds are over")
            continue
        settings = dataclasses.replace(train, cuda_graph=graph)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer, ms = run(recipe, settings, args.device, source, loss, args.steps)
        except Exception:
            traceback.print_exc()
            print(f"{name:<24} failed, see above")
            continue
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
        rate, share = 1e3 * floor.tokens / ms, 1e3 * floor.seconds / ms
        print(f"{name:<24} {ms:>9.2f} {rate:>12,.0f} {share:>13.1%} {peak:>8.1f}", flush=True)
        numbers = {"ms": round(ms, 3), "tokens_per_second": round(rate), "share_of_floor": round(share, 4)}
        rows.append({"step": name, **numbers, "peak_gb": round(peak, 2)})
        if args.profile and graph:
            profile(trainer)
        trainer.feed.close()
        del trainer
    if args.csv and rows:
        about |= {"model": recipe.name, "parameters": count, "batch": train.batch, "length": train.length}
        about |= {"gate": verdict, "commit": commit()}
        about |= {"floor_products_ms": round(1e3 * floor.products, 3), "floor_scans_ms": round(1e3 * floor.scans, 3)}
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [*about, *rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(about | row for row in rows)


if __name__ == "__main__":
    main()
