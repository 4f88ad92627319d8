"""The trainer: short, exact, resumable.

For each step s: batch(s) -> loss -> gradient -> clip -> optimizer at lr(s). Everything that depends on chance is
a function of (seed, s), so a run that was killed and resumed has the same losses as one that was not,
on a CPU to the bit. Losses are read back once every ``log_every`` steps; a checkpoint is only written after
all losses and gradient norms up to it were seen to be finite. In between nothing waits for the device.
"""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mambascope.errors import InputError, MambascopeError
from mambascope.storage import write_bytes
from mambascope.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    read_progress,
    require_room,
    save_checkpoint,
)
from mambascope.training.feed import Feed
from mambascope.training.files import disk_is_full, only_writer
from mambascope.training.floor import Floor
from mambascope.training.graph import StepGraph
from mambascope.training.head import answer_loss
from mambascope.training.machine import machine
from mambascope.training.recipe import TrainSettings, same_recipe
from mambascope.training.sampler import Batch, Batches

__all__ = [
    "TrainResult",
    "TrainingError",
    "check_folder",
    "finish",
    "learning_rate",
    "make_optimizer",
    "train",
    "training",
]

T = TypeVar("T")


class TrainingError(MambascopeError, RuntimeError):
    """A training that cannot go on; its folder keeps the last good checkpoint."""


@dataclass
class TrainResult:
    """Where a training stands: steps done, whether that is all of them, loss rows and evaluation rows."""

    step: int
    finished: bool
    rows: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """lr at a step (0-based): linear warmup to ``lr``, then constant or half a cosine down to ``lr_floor * lr``."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.lr * (settings.lr_floor + (1 - settings.lr_floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam or AdamW as the recipe says. Weight decay acts on matrices only: not on vectors, and not on ``A_log`` and
    ``A_imag``, whose zero is no neutral value."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("A_log", "A_imag"))
        (decayed if matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    on_cuda = all(parameter.is_cuda for parameter in model.parameters())
    graph = on_cuda and settings.cuda_graph  # a recorded step reads its rate from memory
    lr = torch.tensor(settings.lr, device=next(model.parameters()).device) if graph else settings.lr
    return kind(groups, lr=lr, betas=settings.betas, eps=settings.eps, fused=on_cuda or None, capturable=graph)


def train(
    model: nn.Module,
    batches: Batches,
    settings: TrainSettings,
    out: str | Path,
    *,
    recipe: dict[str, Any],
    resume: bool = False,
    minutes: float | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = answer_loss,
    floor: Callable[[], Floor] | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train ``model`` in place on its own device, with checkpoints, ``curve.csv`` and ``curve.json`` in ``out``.

    ``recipe`` is kept beside the checkpoints and compared on resume. ``minutes`` stops early, at a checkpoint from
    which ``resume`` goes on. ``evaluate`` is called without gradients every ``evaluate_every`` steps and at the end.
    ``floor`` measures how fast a step could be (:mod:`mambascope.training.floor`); log lines then say the share of it.
    ``progress`` is told the number of steps done, for a bar.
    Raises InputError (another recipe or trainer owns ``out``, it holds a run and ``resume`` is off, or the disk has no
    room for the checkpoints) and TrainingError (a loss or gradient that is not finite, a disk that fills up: the step
    is named, the last good checkpoint stays).
    """
    return finish(
        training(
            model, batches, settings, out, recipe=recipe, resume=resume, minutes=minutes, evaluate=evaluate, loss=loss,
            floor=floor, report=report, progress=progress,
        )
    )  # fmt: skip


def check_folder(out: Path, recipe: dict[str, Any], resume: bool) -> Path | None:
    """The newest checkpoint that a training of ``recipe`` in ``out`` goes on from; None to start anew.

    Raises InputError where ``out`` holds a training and ``resume`` is off, or one of another recipe, with the
    difference. Changes nothing.
    """
    newest = latest_checkpoint(out)
    if newest is None:
        return None
    if not resume:
        raise InputError(f"{out} already holds a training ({newest.name}); go on with --resume or give another --out")
    same_recipe(read_progress(newest)["recipe"], recipe)
    return newest


def finish(steps: Generator[None, None, T]) -> T:
    """Run something that pauses between its steps to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def training(
    model: nn.Module,
    batches: Batches,
    settings: TrainSettings,
    out: str | Path,
    *,
    recipe: dict[str, Any],
    resume: bool = False,
    minutes: float | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = answer_loss,
    floor: Callable[[], Floor] | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[[int], None] | None = None,
    locked: bool = False,
) -> Generator[None, None, TrainResult]:
    """:func:`train`, pausing after each step: several trainings may take turns in one thread, each on a stream of its
    own, so that a GPU works on all of them at once. ``locked``: the caller is already ``out``'s one writer."""
    out = Path(out)
    with (
        nullcontext() if locked else only_writer(out),
        _Run(model, batches, settings, out, recipe, loss, report) as run,
    ):
        run.begin(resume)
        if floor is not None and run.result.step < settings.steps:
            try:
                run.floor = floor()
                report(str(run.floor))
            except RuntimeError as error:  # out of memory, most likely: a run can do without knowing its floor
                report(f"the floor could not be measured ({str(error).splitlines()[0]}); training without its share")
        deadline = math.inf if minutes is None else time.perf_counter() + 60 * minutes
        while run.result.step < settings.steps:
            yield from run.interval()
            if progress is not None:
                progress(run.result.step)
            step, last = run.result.step, run.result.step == settings.steps
            late = time.perf_counter() > deadline
            if evaluate is not None and (last or step % settings.evaluate_every == 0):
                run.evaluate(evaluate)
            if last or late or step % settings.checkpoint_every == 0:
                run.checkpoint()
            if late and not last:
                report(f"stopped after {minutes:g} minutes at step {step:,}; go on with --resume")
                break
        run.result.finished = run.result.step == settings.steps
        return run.result


class _Run:
    """The parts of one training, so that :func:`train` reads as its algorithm."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        settings: TrainSettings,
        out: Path,
        recipe: dict[str, Any],
        loss: Callable[[nn.Module, Batch], Tensor],
        report: Callable[[str], None],
    ) -> None:
        self.model, self.settings, self.out = model, settings, out
        self.recipe, self.loss, self.report = recipe, loss, report
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, settings)
        self.result = TrainResult(0, False)
        self.autocast = self.device.type == "cuda" and settings.precision == "bf16"
        record = settings.cuda_graph and self.device.type == "cuda"
        self.graph = StepGraph(self.update, self.device, report) if record else None
        self.feed = Feed(batches, getattr(getattr(model, "cfg", None), "n_tokens", None), self.device, settings.steps)
        self.floor: Floor | None = None
        self.seconds = 0.0

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *error: Any) -> None:
        self.feed.close()

    def begin(self, resume: bool) -> None:
        newest = check_folder(self.out, self.recipe, resume)
        if newest is not None:
            progress = load_checkpoint(newest, self.model, self.optimizer)
            self.seconds = progress["seconds"]
            self.result = TrainResult(progress["step"], False, progress["rows"], progress["evaluations"])
            self.report(f"resumed at step {self.result.step:,} of {self.settings.steps:,}")
        elif resume:
            self.report(f"{self.out} holds no checkpoint yet: starting at step 0")
        if self.result.step < self.settings.steps:
            require_room(self.out, self.model)
        arithmetic = "bfloat16 autocast" if self.autocast else "float32"
        arithmetic += ", one CUDA graph a step" if self.graph is not None else ""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        self.report(f"{count:,} parameters on {self.device}, {arithmetic}; {self.settings.steps:,} steps")

    def interval(self) -> Generator[None, None, None]:
        """Steps up to the next log line, a pause after each; then one line, one row, and the check that all was
        finite."""
        settings, started = self.settings, time.perf_counter()
        first = self.result.step
        last = min((first // settings.log_every + 1) * settings.log_every, settings.steps)
        self.model.train()
        pairs = []
        for step in range(first, last):
            pairs.append(self.step(step))
            yield
        losses, norms = (torch.stack(values).double().cpu() for values in zip(*pairs, strict=True))
        for index in range(last - first):
            if not (torch.isfinite(losses[index]) and torch.isfinite(norms[index])):
                newest = latest_checkpoint(self.out)
                raise TrainingError(
                    f"step {first + index}: loss {losses[index].item()}, gradient norm {norms[index].item()}; stopped. "
                    f"The last good checkpoint is {newest.name if newest else 'none yet'}; "
                    "lower train.lr or look at that batch"
                )
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        rate = (last - first) * settings.batch * settings.length / elapsed
        self.result.step = last
        row = {
            "step": last,
            "tokens": last * settings.batch * settings.length,
            "loss": losses.mean().item(),
            "lr": learning_rate(settings, last - 1),
            "grad_norm": norms.mean().item(),
            "tokens_per_second": round(rate, 1),
            "seconds": round(self.seconds, 3),
        }
        self.result.rows.append(row)
        left = (settings.steps - last) * settings.batch * settings.length / rate
        share = "" if self.floor is None else f" ({rate / self.floor.tokens_per_second:.0%} of the floor)"
        self.report(
            f"step {last:,}/{settings.steps:,}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
            f"norm {row['grad_norm']:.2f}  {rate:,.0f} tokens/s{share}  {self.seconds:.0f} s, {left:.0f} s left"
        )

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns loss and gradient norm, still on the device."""
        rate = learning_rate(self.settings, step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return (self.graph or self.update)(self.feed(step))

    def update(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss, gradient, clip, optimizer. Tokens stay where they are: the model checks them on the host, unwaited."""
        batch = Batch(batch.tokens, batch.targets.to(self.device, non_blocking=True))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf)
        self.optimizer.step()
        return loss.detach(), norm.detach()

    def evaluate(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> None:
        self.model.eval()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            values = evaluate(self.model)
        self.result.evaluations.append({"step": self.result.step, **values})
        self.report(f"  step {self.result.step:,}: " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def checkpoint(self) -> None:
        result = self.result
        curve = {"rows": result.rows, "evaluations": result.evaluations}
        progress = {"recipe": self.recipe, "seconds": self.seconds, "machine": machine(self.device), **curve}
        if self.floor is not None:
            progress["floor"] = {**asdict(self.floor), "tokens_per_second": self.floor.tokens_per_second}
        table = io.StringIO()
        writer = csv.DictWriter(table, list(result.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(result.rows)
        try:
            save_checkpoint(self.out, result.step, self.model, self.optimizer, progress)
            write_bytes(self.out / "curve.csv", table.getvalue().encode())
            write_bytes(self.out / "curve.json", json.dumps(curve).encode())
        except OSError as error:
            if not disk_is_full(error):
                raise
            newest = latest_checkpoint(self.out)
            raise TrainingError(
                f"step {result.step}: {self.out} could not be written: {error.strerror}; stopped. The last good "
                f"checkpoint is {newest.name if newest else 'none yet'}; make room and go on with --resume"
            ) from None
